"""What an S3 server's refusals, and whatever else goes wrong with it, mean to whoever asked."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from proxyrob.errors import DataIntegrityError, SourceUnavailable

OTHER_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException", "TemporaryRedirect"}
ALTERED = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody"}
FAILED = {"SlowDown", "RequestTimeout", "ServiceUnavailable", "InternalError"}
REMEDIES = {
    "SignatureDoesNotMatch": "the secret key is not the one of this access key; correct AWS_SECRET_ACCESS_KEY or the profile",
    "InvalidAccessKeyId": "the access key is unknown there; correct AWS_ACCESS_KEY_ID, AWS_PROFILE or AWS_ENDPOINT_URL",
    "ExpiredToken": "the session has expired; sign in again for a new AWS_SESSION_TOKEN",
    "InvalidToken": "the session token is not valid; sign in again for a new AWS_SESSION_TOKEN",
    "AccessDenied": "allow it s3:ListBucket, s3:GetObject, s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload there "
    "(without s3:ListBucket, S3 denies access to an object that is not there, too)",
}


class Refusal(NamedTuple):
    """An answer that is an error: the place asked for, the client that asked, and what the server said."""

    place: str
    bucket: str
    endpoint: str
    region: str
    access_key: str
    attempts: int
    operation: str
    answer: Mapping[str, Any]

    @property
    def status(self) -> int:
        return self.answer["ResponseMetadata"]["HTTPStatusCode"]

    @property
    def headers(self) -> Mapping[str, str]:
        return self.answer["ResponseMetadata"].get("HTTPHeaders", {})

    @property
    def error(self) -> Mapping[str, str]:
        return self.answer["Error"]

    @property
    def code(self) -> str:
        return self.error["Code"]

    @property
    def said(self) -> str:
        return f"{self.operation}: {self.code}: {self.error.get('Message', '')}"


def explain_refusal(refusal: Refusal) -> Exception:
    """The exception for a refusal: ``FileNotFoundError``, ``PermissionError``, ``SourceUnavailable`` or ``ValueError``.

    Its text names bucket, key and remedy.
    """
    code, place, bucket = refusal.code, refusal.place, refusal.bucket
    if code == "NoSuchBucket":
        return FileNotFoundError(
            f"{place}: there is no bucket {bucket} at {refusal.endpoint}; make it, or correct the address or AWS_ENDPOINT_URL"
        )
    if code in {"NoSuchKey", "404"}:
        return FileNotFoundError(f"{place} is not there; check the key, or make it again")
    if code == "InvalidBucketName":
        return ValueError(f"{place}: {bucket} is no name of a bucket; correct the address")
    if code in ALTERED:
        return SourceUnavailable(f"{place}: the content was altered on its way ({refusal.said}); send it again")
    if refusal.status in {429, 500, 502, 503, 504, 507} or code in FAILED:
        return SourceUnavailable(
            f"{place}: the server at {refusal.endpoint} failed {refusal.attempts} times ({refusal.said}); try again later"
        )
    return PermissionError(f"{place}: {_why_refused(refusal)}")


def unreachable(place: str, attempts: int, error: Exception) -> SourceUnavailable:
    """The exception for a server that does not answer."""
    return SourceUnavailable(
        f"{place} cannot be reached, asked {attempts} times ({error}); check the network, AWS_ENDPOINT_URL and that the server "
        "runs"
    )


def unusable_credentials(place: str, error: Exception) -> PermissionError:
    """The exception for a client that cannot sign a request."""
    return PermissionError(
        f"no usable AWS credentials for {place} ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to "
        "a profile of ~/.aws/credentials, or give the machine a role"
    )


def damaged(place: str, expected: str | None, found: str, size_bytes: int) -> DataIntegrityError:
    """The exception for content that does not have its hash."""
    return DataIntegrityError(
        f"{place} is damaged: expected sha256 {expected}, got {found} ({size_bytes} bytes); delete it and make it again"
    )


def restless(place: str) -> SourceUnavailable:
    """The exception for an object that is replaced again and again."""
    return SourceUnavailable(f"{place} was replaced while it was read; try again later")


def _why_refused(refusal: Refusal) -> str:
    code = refusal.code
    if code in OTHER_REGION or refusal.status in {301, 307}:
        region = refusal.error.get("Region") or refusal.headers.get("x-amz-bucket-region") or "another one"
        return (
            f"the bucket {refusal.bucket} is not in the region {refusal.region} but in {region}; set AWS_DEFAULT_REGION "
            f"({refusal.said})"
        )
    if code in {"RequestTimeTooSkewed", "RequestExpired"}:
        return (
            f"this machine's clock ({datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC) differs too much from the server's "
            f"({refusal.headers.get('date', 'unknown')}); set it, for instance by NTP ({refusal.said})"
        )
    remedy = REMEDIES.get(code, "this server may not offer what is needed, or a policy forbids it")
    return f"{refusal.endpoint} refuses the access key {refusal.access_key} ({refusal.said}); {remedy}"
