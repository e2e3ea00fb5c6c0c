"""Whatever goes wrong with S3: one exception per thing a caller can do about it, naming place and remedy."""

from collections.abc import Callable
from pathlib import Path

import pytest

from proxyrob.errors import DataIntegrityError, SourceUnavailable
from proxyrob.storage import s3
from proxyrob.storage.store import Store, open_store
from tests.s3_faults import Fault, FaultyProxy
from tests.s3_server import BUCKET, GUEST_KEY, GUEST_SECRET, S3Server, free_ports
from tests.storage.conftest import forget_client
from tests.toys import files_below


def _calls(store: Store, folder: Path) -> list[Callable[[], object]]:
    """Every method that asks the server."""
    (folder / "file").write_bytes(b"x")
    return [
        lambda: store.stat("key"),
        lambda: list(store.list()),
        lambda: store.read("key"),
        lambda: store.write("key", b"x"),
        lambda: store.upload("key", folder / "file"),
        lambda: store.download("key", folder / "got"),
        lambda: store.delete("key"),
    ]


def _expect(calls: list[Callable[[], object]], error: type[Exception], *parts: str) -> None:
    for call in calls:
        with pytest.raises(error) as raised:
            call()
        for part in parts:
            assert part in str(raised.value)


def test_a_wrong_secret(s3_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Refused by every method, naming bucket, access key and the variable to correct."""
    s3_environment.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    calls = _calls(open_store(f"s3://{BUCKET}/a"), tmp_path)
    _expect(
        calls, PermissionError, f"s3://{BUCKET}/a/", "test:tester", "SignatureDoesNotMatch", "correct AWS_SECRET_ACCESS_KEY"
    )
    assert files_below(tmp_path) == {"file"}


def test_no_permission(s3_store: Store, s3_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user who is known but may not, is told what to allow."""
    s3_store.write("key", b"x")
    s3_environment.setenv("AWS_ACCESS_KEY_ID", GUEST_KEY)
    s3_environment.setenv("AWS_SECRET_ACCESS_KEY", GUEST_SECRET)
    forget_client()
    _expect(_calls(s3_store, tmp_path), PermissionError, s3_store.uri, GUEST_KEY, "AccessDenied", "s3:PutObject")


def test_no_such_bucket(s3_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A bucket that does not exist is not mistaken for a missing object."""
    calls = _calls(open_store("s3://no-such-bucket/a"), tmp_path)
    _expect(
        calls, FileNotFoundError, "there is no bucket no-such-bucket at http://127.0.0.1", "make it, or correct the address"
    )


def test_no_credentials(s3_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Missing credentials are told with all the ways to give some, and before a file is read."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        s3_environment.delenv(name)
    store = open_store(f"s3://{BUCKET}/a")
    _expect(
        _calls(store, tmp_path), PermissionError, store.uri, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    )
    s3_environment.setenv("AWS_PROFILE", "nobody")
    _expect(_calls(store, tmp_path), PermissionError, "The config profile (nobody) could not be found")


def test_a_profile_is_enough(s3_server: S3Server, s3_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials, region and endpoint may come from a profile of AWS's own files."""
    for name in s3_server.environment:
        s3_environment.delenv(name)
    settings = [f"{name.lower().replace('default_', '')[4:]} = {value}" for name, value in s3_server.environment.items()]
    settings = [f"aws_{line}" if line.startswith(("access", "secret")) else line for line in settings]
    (tmp_path / "config").write_text("\n".join(["[profile lab]", *settings]))
    s3_environment.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    s3_environment.setenv("AWS_PROFILE", "lab")
    store = open_store(f"s3://{BUCKET}/{tmp_path.name}")
    assert store.write("key", b"x")
    assert store.read("key") == b"x"


def test_an_endpoint_that_is_no_address(s3_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mistyped endpoint is told as such."""
    s3_environment.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9")
    _expect(
        _calls(open_store(f"s3://{BUCKET}"), tmp_path), ValueError, "AWS_ENDPOINT_URL or the profile's endpoint is no address"
    )


def test_nobody_listens(s3_environment: pytest.MonkeyPatch) -> None:
    """A server that is not there may be there later: asked several times, then the only error that flows retry."""
    s3_environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    store = open_store(f"s3://{BUCKET}/a")
    _expect([lambda: store.stat("key")], SourceUnavailable, f"s3://{BUCKET}/a/key cannot be reached, asked 3 times")


@pytest.mark.parametrize(
    ("status", "code", "details", "headers", "error", "parts"),
    [
        (403, "RequestTimeTooSkewed", "", (), PermissionError, ("this machine's clock (", "differs too much", "NTP")),
        (403, "InvalidAccessKeyId", "", (), PermissionError, ("test:tester", "the access key is unknown there")),
        (400, "ExpiredToken", "", (), PermissionError, ("sign in again",)),
        (
            400,
            "AuthorizationHeaderMalformed",
            "<Region>eu-west-1</Region>",
            (),
            PermissionError,
            ("is not in the region us-east-1 but in eu-west-1", "AWS_DEFAULT_REGION"),
        ),
        (
            301,
            "PermanentRedirect",
            f"<Bucket>{BUCKET}</Bucket>",
            (("x-amz-bucket-region", "eu-west-1"),),
            PermissionError,
            ("is not in the region", "AWS_DEFAULT_REGION"),
        ),
        (400, "BadDigest", "", (), SourceUnavailable, ("altered on its way", "send it again")),
        (403, "AllAccessDisabled", "", (), PermissionError, ("AllAccessDisabled", "told by the test")),
        (501, "NotImplemented", "", (), PermissionError, ("this server may not offer what is needed",)),
    ],
)
def test_refusals_that_swift_does_not_know(
    faulty: FaultyProxy,
    tmp_path: Path,
    status: int,
    code: str,
    details: str,
    headers: tuple[tuple[str, str], ...],
    error: type[Exception],
    parts: tuple[str, ...],
) -> None:
    """Amazon's own refusals, sent by a proxy: each is told with its remedy, and none is asked again for ever."""
    faulty.faults = [Fault("refuse", times=1000, status=status, error=code, details=details, headers=headers)]
    _expect(_calls(open_store(f"s3://{BUCKET}/a"), tmp_path), error, f"s3://{BUCKET}/a", *parts)
    assert len(faulty.seen) < 7 * 4


def test_a_busy_server_is_asked_again(faulty: FaultyProxy, s3_store: Store, tmp_path: Path) -> None:
    """Two refusals for lack of time pass unnoticed; when they do not end, that is told."""
    s3_store.write("key", b"content")
    faulty.faults = [Fault("refuse", "GET", times=2)]
    assert s3_store.read("key") == b"content"
    faulty.faults = [Fault("refuse", times=1000)]
    _expect([lambda: s3_store.read("key")], SourceUnavailable, f"{s3_store.uri}/key", "failed 3 times", "SlowDown")


def test_a_slow_server_is_given_up(faulty: FaultyProxy, s3_store: Store, s3_environment: pytest.MonkeyPatch) -> None:
    """An answer that does not come in time is asked for again, and counts as an absent server when it never does."""
    s3_environment.setattr(s3, "READ_TIMEOUT_S", 0.5)
    forget_client()
    s3_store.write("key", b"content")
    faulty.faults = [Fault("delay", "GET", seconds=1.0)]
    assert s3_store.read("key") == b"content"
    faulty.faults = [Fault("delay", "GET", seconds=1.0, times=1000)]
    _expect([lambda: s3_store.read("key")], SourceUnavailable, "cannot be reached", "Read timeout")


def test_an_answer_that_breaks_off_is_asked_for_again(faulty: FaultyProxy, s3_store: Store, tmp_path: Path) -> None:
    """Half an answer is noticed, and asked for again; a store that always breaks off is told, and nothing is left."""
    content = bytes(range(256)) * 70_000  # three ranges
    s3_store.write("key", content)
    faulty.faults = [Fault("cut answer", "GET", times=2)]
    s3_store.download("key", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    faulty.faults = [Fault("cut answer", "GET", times=1000)]
    _expect([lambda: s3_store.download("key", tmp_path / "other")], SourceUnavailable, "broke off 3 times")
    assert files_below(tmp_path) == {"file"}


def test_content_altered_on_the_way(faulty: FaultyProxy, s3_store: Store, tmp_path: Path) -> None:
    """A flipped bit is noticed and the object fetched again; when that does not help, no file appears."""
    content = bytes(range(256)) * 1000
    s3_store.write("key", content)
    faulty.faults = [Fault("alter answer", "GET")]
    s3_store.download("key", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    faulty.faults = [Fault("alter answer", "GET")]
    assert s3_store.read("key") == content
    faulty.faults = [Fault("alter answer", "GET", times=1000)]
    calls = [lambda: s3_store.download("key", tmp_path / "other"), lambda: s3_store.read("key")]
    _expect(calls, DataIntegrityError, f"{s3_store.uri}/key is damaged", "expected sha256", "(256000 bytes)", "make it again")
    assert files_below(tmp_path) == {"file"}


@pytest.mark.parametrize("kept", [b"conten", b"Content"], ids=["truncated", "altered"])
def test_an_object_that_is_not_what_its_writer_wrote(s3_server: S3Server, s3_store: Store, tmp_path: Path, kept: bytes) -> None:
    """A truncated or altered object is told by the hash in its own metadata, and no file appears."""
    s3_store.write("key", b"content")
    info = s3_store.stat("key")
    assert info is not None
    name = f"{s3_store.uri}/key".removeprefix(f"s3://{BUCKET}/")
    client = s3_server.client()
    client.put_object(Bucket=BUCKET, Key=name, Body=kept, Metadata={"sha256": info.sha256})
    client.close()
    calls = [lambda: s3_store.download("key", tmp_path / "file"), lambda: s3_store.read("key")]
    _expect(calls, DataIntegrityError, "key is damaged", f"expected sha256 {info.sha256}", f"({len(kept)} bytes)")
    assert files_below(tmp_path) == set()


def test_a_rotten_disk_of_the_server(s3_server: S3Server, s3_store: Store, tmp_path: Path) -> None:
    """A byte that flips on the server's own disk never reaches a file of ours."""
    s3_store.write("key", b"unlike any other content " * 1000)
    path = s3_server.object_files()[-1]
    attributes = path.stat()
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(100)
        file.write(bytes([content[100] ^ 0xFF]))
    assert path.stat().st_size == attributes.st_size
    with pytest.raises((DataIntegrityError, FileNotFoundError, SourceUnavailable), match="key"):  # Swift may set it aside
        s3_store.download("key", tmp_path / "file")
    assert files_below(tmp_path) == set()
