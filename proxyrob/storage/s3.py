"""A prefix of an S3 bucket as a store.

Credentials, profile, region and endpoint are found by boto3 as always (``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``,
``AWS_ENDPOINT_URL``, roles, …). This is the only module that imports it.
"""

import hashlib
import os
import re
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.exceptions import ConnectionError as NotConnected

from proxyrob.errors import DataIntegrityError, SourceUnavailable
from proxyrob.storage.bounded import SMALL_BYTES, require_small
from proxyrob.storage.files import sha256_of
from proxyrob.storage.placed import checked_key, is_hidden, is_key, placed
from proxyrob.storage.s3_pace import THREADS, beside_each_other, wait
from proxyrob.storage.s3_refusals import Refusal, damaged, explain_refusal, restless, unreachable, unusable_credentials
from proxyrob.storage.store import ObjectInfo, require_size
from proxyrob.storage.verified import known_hash

PART_BYTES = 16 << 20  # larger files are sent in parts of this size
MAX_PARTS = 1000  # what the strictest servers take; of larger files the parts are larger
RANGE_BYTES = 8 << 20  # larger objects are fetched in ranges of this size
ATTEMPTS = 5  # of every request, and of every answer that breaks off
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 30
CONNECTIONS = 4 * THREADS

SHA256, WRITER = "sha256", "writer"  # user metadata: x-amz-meta-sha256, x-amz-meta-writer
BROKEN_OFF = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError, FlexibleChecksumError)
TAKEN = {"PreconditionFailed", "ConditionalRequestConflict", "OperationAborted", "NoSuchUpload"}


class _Opened(NamedTuple):
    """An object, and the answer that brings its first bytes."""

    info: ObjectInfo
    writer: str | None
    etag: str
    body: Any


class _ReplacedMeanwhile(Exception):
    """An object changed between two ranges of it."""


class S3Store:
    """Objects of a bucket whose keys begin with a prefix.

    The hash of every object is kept in its metadata (``x-amz-meta-sha256``) and compared after it was read; on the way in
    the server compares another (``x-amz-checksum-sha256``). Requests are repeated after a random and growing delay. A file
    sent in parts is no object before its last request; parts of a killed writer stay, unseen and paid for, until the same
    key is uploaded again or a rule of the bucket (``AbortIncompleteMultipartUpload``) removes them.

    That of two writers exactly one is told ``True`` rests on ``If-None-Match``, for files in parts on that of the last
    request. Amazon S3 promises it. OpenStack Swift looks whether the object is there before it reads the content: of
    writers that overlap there the last one wins and several may be told ``True``; the object is whole in any case.
    """

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self.bucket = bucket
        self.prefix = prefix

    @classmethod
    def at(cls, uri: str) -> "S3Store":
        """The store at ``s3://bucket/prefix``.

        Raises ``ValueError`` for anything else.
        """
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not uri.startswith("s3://") or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}", bucket) is None:
            raise ValueError(f"expected s3://bucket/prefix, got {uri!r}")
        prefix = prefix.rstrip("/")
        return cls(bucket, checked_key(prefix) if prefix else "")

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def below(self, prefix: str) -> "S3Store":
        return S3Store(self.bucket, self._name(prefix.rstrip("/")))

    def local_path(self, key: str) -> Path | None:
        checked_key(key)
        return None

    def stat(self, key: str) -> ObjectInfo | None:
        found = self._find(key, 1)
        if found is None:
            return None
        _leave(found)
        return found.info

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        root = f"{self.prefix}/" if self.prefix else ""
        with self._explained(f"{self.uri}/{prefix}"):
            for page in _client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=root + prefix):
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(root)
                    if is_key(key) and not is_hidden(key):  # some programs mark folders by empty objects «folder/»
                        yield ObjectInfo(key=key, size_bytes=entry["Size"], sha256=None)

    def read(self, key: str, *, limit_bytes: int = SMALL_BYTES) -> bytes:
        for last in (False, True):
            found = self._open(key)
            require_small(self._place(key), found.info.size_bytes, limit_bytes)
            with suppress(_ReplacedMeanwhile):
                content = b"".join(self._content(key, found))
                sha256 = hashlib.sha256(content).hexdigest()
                if found.info.sha256 in {None, sha256}:
                    return content
                if last:
                    raise damaged(self._place(key), found.info.sha256, sha256, len(content))
        raise restless(self._place(key))

    def download(self, key: str, path: Path, *, sha256: str | None = None, size_bytes: int | None = None) -> None:
        found = self._open(key)
        require_size(self._place(key), found.info.size_bytes, size_bytes)
        with placed(path, replace=True) as placing:
            for last in (False, True):  # what the way here altered is whole the second time
                with suppress(_ReplacedMeanwhile):
                    for content in self._content(key, found):
                        placing.write(content)
                    expected = sha256 or found.info.sha256
                    if expected in {None, placing.sha256}:
                        return
                    if last:
                        raise damaged(self._place(key), expected, placing.sha256, placing.size_bytes)
                if not last:
                    placing.restart()
                    found = self._open(key)
            raise restless(self._place(key))

    def write(self, key: str, content: bytes, *, replace: bool = False) -> bool:
        digest = hashlib.sha256(content)
        writer = uuid.uuid4().hex
        arguments = {
            "Key": self._name(key),
            "Body": content,
            "ChecksumSHA256": b64encode(digest.digest()).decode(),
            "Metadata": {SHA256: digest.hexdigest(), WRITER: writer},
        }
        if replace:
            self._ask("put_object", key, **arguments)
            return True
        return self._claim(key, writer, lambda: self._ask("put_object", key, **arguments, IfNoneMatch="*", passing=TAKEN))

    def upload(self, key: str, path: Path, *, replace: bool = False) -> bool:
        size_bytes = path.stat().st_size
        if size_bytes <= PART_BYTES:
            return self.write(key, path.read_bytes(), replace=replace)
        if self.stat(key) is not None and not replace:  # asked in any case: what cannot be reached is known before hashing
            return False
        sha256, writer = known_hash(path) or sha256_of(path), uuid.uuid4().hex
        arguments = {"ChecksumAlgorithm": "SHA256", "Metadata": {SHA256: sha256, WRITER: writer}}
        upload = {"Key": self._name(key)}
        upload["UploadId"] = self._ask("create_multipart_upload", key, **upload, **arguments)["UploadId"]
        done = False
        try:
            parts = self._send_parts(key, upload, path, sha256, max(PART_BYTES, -(-size_bytes // MAX_PARTS)))
            last = {**upload, "MultipartUpload": {"Parts": parts}, **({} if replace else {"IfNoneMatch": "*"})}
            done = self._claim(key, writer, lambda: self._ask("complete_multipart_upload", key, **last, passing=TAKEN))
        except ClientError:  # a part was refused: somebody has ended this upload
            done = self._is_ours(key, writer) or False
        finally:
            if not done:
                self._abort(upload)
        if not done and (replace or self.stat(key) is None):
            raise SourceUnavailable(f"{self._place(key)}: the upload was ended by somebody else; start it again")
        if done and not replace:
            self._abort_others(upload["Key"])
        return done

    def delete(self, key: str) -> None:
        with suppress(ClientError):
            self._ask("delete_object", key, Key=self._name(key), passing={"NoSuchKey"})

    # ---- reading

    def _open(self, key: str) -> _Opened:
        found = self._find(key, RANGE_BYTES)
        if found is None:
            raise FileNotFoundError(f"{self._place(key)} is not there; check the key, or make it again")
        return found

    def _find(self, key: str, size_bytes: int) -> _Opened | None:
        """An object with its first bytes; ``None`` when there is none.

        A range rather than a HEAD, whose refusals have no text: a missing object would look like a missing bucket, and a
        wrong secret like a wrong clock.
        """
        asked = {"Key": self._name(key), "Range": f"bytes=0-{size_bytes - 1}"}
        try:
            answer = self._ask("get_object", key, **asked, passing={"NoSuchKey", "InvalidRange"})
            size_bytes = int(answer["ContentRange"].rpartition("/")[2])
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                return None
            answer = self._ask("head_object", key, Key=self._name(key))  # an empty object has no range
            size_bytes = 0
        metadata = answer["Metadata"]
        info = ObjectInfo(key=key, size_bytes=size_bytes, sha256=metadata.get(SHA256))
        return _Opened(info, metadata.get(WRITER), answer["ETag"], answer.get("Body"))

    def _content(self, key: str, opened: _Opened) -> Iterator[bytes]:
        """The whole content in order, its ranges fetched beside each other."""

        def fetch(start: int) -> bytes:
            if start == 0:
                with suppress(*BROKEN_OFF):
                    return opened.body.read()
            return self._get(key, start, opened.etag)

        return beside_each_other(fetch, range(0, opened.info.size_bytes, RANGE_BYTES))

    def _get(self, key: str, start: int, etag: str) -> bytes:
        """One range of an object, asked for again when the answer breaks off."""
        asked = {"Key": self._name(key), "Range": f"bytes={start}-{start + RANGE_BYTES - 1}", "IfMatch": etag}
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._ask("get_object", key, **asked, passing=TAKEN | {"InvalidRange"})["Body"].read()
            except ClientError as error:
                raise _ReplacedMeanwhile from error
            except BROKEN_OFF as error:
                if attempt == ATTEMPTS:
                    raise SourceUnavailable(
                        f"{self._place(key)}: the answer broke off {ATTEMPTS} times ({error}); check the network and the server"
                    ) from error
            wait(attempt)
        raise AssertionError

    # ---- writing

    def _claim(self, key: str, writer: str, request: Callable[[], object]) -> bool:
        """Make the request that creates an object; whether it was this one that did.

        A request whose answer was lost is repeated and then refused, for the object it has itself created is there: the
        writer's name in the metadata tells.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                request()
            except ClientError:
                ours = self._is_ours(key, writer)
                if ours is not None:
                    return ours
            else:
                return True
            wait(attempt)  # the other writer is not ready, or has failed
        raise SourceUnavailable(f"{self._place(key)}: refused {ATTEMPTS} times because of another writer; try again later")

    def _is_ours(self, key: str, writer: str) -> bool | None:
        found = self._find(key, 1)
        if found is None:
            return None
        _leave(found)
        return found.writer == writer

    def _send_parts(
        self, key: str, upload: dict[str, str], path: Path, sha256: str, part_bytes: int
    ) -> tuple[dict[str, object], ...]:
        whole = hashlib.sha256()

        def numbered() -> Iterator[tuple[int, bytes]]:
            with path.open("rb") as file:
                for number, content in enumerate(iter(lambda: file.read(part_bytes), b""), 1):
                    whole.update(content)
                    yield number, content

        def send(part: tuple[int, bytes]) -> dict[str, object]:
            number, content = part
            checksum = b64encode(hashlib.sha256(content).digest()).decode()
            answer = self._ask(
                "upload_part", key, **upload, PartNumber=number, Body=content, ChecksumSHA256=checksum, passing=TAKEN
            )
            return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum}

        parts = tuple(beside_each_other(send, numbered()))
        if whole.hexdigest() != sha256:
            raise DataIntegrityError(f"{path} changed while it was uploaded to {self._place(key)}; upload it again")
        return parts

    def _abort(self, upload: dict[str, str]) -> None:
        """Best effort: what stays is unseen, and the reason why it stays is that of the error that led here."""
        with suppress(ClientError, BotoCoreError):
            _client().abort_multipart_upload(Bucket=self.bucket, **upload)

    def _abort_others(self, name: str) -> None:
        """Remove what killed writers of an object left, now that it is there; best effort, as above."""
        with suppress(ClientError, BotoCoreError):
            found = _client().list_multipart_uploads(Bucket=self.bucket, Prefix=name)
            for entry in found.get("Uploads", ()):
                if entry["Key"] == name:
                    self._abort({"Key": name, "UploadId": entry["UploadId"]})

    # ---- requests and their errors

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{checked_key(key)}".removeprefix("/")

    def _place(self, key: str) -> str:
        return f"{self.uri}/{key}"

    def _ask(self, operation: str, key: str, *, passing: Iterable[str] = (), **arguments: object) -> Any:
        """One request; refusals whose code is in ``passing`` are raised as they are."""
        with self._explained(self._place(key), passing):
            return getattr(_client(), operation)(Bucket=self.bucket, **arguments)

    @contextmanager
    def _explained(self, place: str, passing: Iterable[str] = ()) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            if error.response["Error"]["Code"] in passing:
                raise
            client, access_key = _connection(os.getpid())
            refusal = Refusal(
                place=place,
                bucket=self.bucket,
                endpoint=client.meta.endpoint_url,
                region=client.meta.region_name,
                access_key=access_key,
                attempts=ATTEMPTS,
                operation=error.operation_name,
                answer=error.response,
            )
            raise explain_refusal(refusal) from error
        except (HTTPClientError, NotConnected) as error:
            raise unreachable(place, ATTEMPTS, error) from error
        except ParamValidationError as error:
            raise ValueError(f"{place} is no place of S3: {error}") from error
        except BotoCoreError as error:
            raise unusable_credentials(place, error) from error


class _Connection(NamedTuple):
    client: Any
    access_key: str


@lru_cache(maxsize=1)
def _connection(process: int) -> _Connection:
    """The client of a process, which its threads share; a forked child makes its own.

    Raises ``PermissionError`` when there are no credentials, and ``ValueError`` for an endpoint that is no address.
    """
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},  # after a random part of 1, 2, 4, … seconds
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
    )
    try:
        session = Session()
        credentials = session.get_credentials()
        if credentials is None:
            raise NoCredentialsError
        return _Connection(session.client("s3", config=config), credentials.access_key)
    except ValueError as error:
        raise ValueError(f"AWS_ENDPOINT_URL or the profile's endpoint is no address: {error}") from error


def _client() -> Any:
    return _connection(os.getpid()).client


def _leave(opened: _Opened) -> None:
    """Read the one byte that was asked for, so that the connection can be used again."""
    if opened.body is not None:
        with suppress(*BROKEN_OFF):
            opened.body.read()
