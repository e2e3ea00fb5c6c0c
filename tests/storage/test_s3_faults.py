"""Whatever breaks while objects travel: afterwards each is whole or absent, and a second run completes the set."""

import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from proxyrob.errors import DataIntegrityError, SourceUnavailable
from proxyrob.storage import s3
from proxyrob.storage.store import Store, open_store
from tests.s3_faults import Fault, FaultyProxy
from tests.s3_server import BUCKET, S3Server
from tests.storage.conftest import forget_client
from tests.toys import files_below

PART_BYTES = 5 << 20  # the smallest that servers take
SENDER = """
import os, signal, sys, time
from pathlib import Path
from proxyrob.storage import s3
from proxyrob.storage.store import open_store
s3.PART_BYTES = 5 << 20
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        store = open_store(sys.argv[1])
        for path in sorted(Path(sys.argv[2]).iterdir()):
            store.upload(f"set/{path.name}", path)
        os._exit(0)
    if float(line) > 0:
        time.sleep(float(line))
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""  # each line of input starts one writer, and says after how many seconds it is killed; 0: not at all


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts and ranges as small as they can be."""
    monkeypatch.setattr(s3, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(s3, "RANGE_BYTES", 1 << 20)


@pytest.fixture
def big_file(tmp_path: Path, small_parts: None) -> Path:
    """A file of three parts."""
    path = tmp_path / "big"
    path.write_bytes(os.urandom(2 * PART_BYTES + 1))
    return path


def open_uploads(server: S3Server, prefix: str = "") -> list[str]:
    """Keys of uploads that were begun and not ended."""
    client = server.client()
    found = client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", ())
    client.close()
    return [entry["Key"] for entry in found]


def _name(store: Store, key: str) -> str:
    return f"{store.uri}/{key}".removeprefix(f"s3://{BUCKET}/")


def test_an_answer_that_is_lost_does_not_lose_the_claim(faulty: FaultyProxy, s3_store: Store, big_file: Path) -> None:
    """A writer whose request was done and whose answer was lost is told that it wrote, for small objects and large ones."""
    faulty.faults = [Fault("lose answer", "PUT", "small")]
    assert s3_store.write("small", b"content") is True
    faulty.faults = [Fault("lose answer", "POST", "large?uploadId")]
    assert s3_store.upload("large", big_file) is True
    assert (s3_store.write("small", b"other"), s3_store.upload("large", big_file)) == (False, False)
    assert all(fault.times == 0 for fault in faulty.faults)


def test_parts_that_break_off_are_sent_again(
    faulty: FaultyProxy, s3_server: S3Server, s3_store: Store, big_file: Path, tmp_path: Path
) -> None:
    """A connection that is cut in the middle of a part, and a busy server, cost a repetition and nothing else."""
    faulty.faults = [Fault("cut request", "PUT", "partNumber=1"), Fault("refuse", "PUT", "partNumber=2")]
    assert s3_store.upload("key", big_file) is True
    s3_store.download("key", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == big_file.read_bytes()
    assert all(fault.times == 0 for fault in faulty.faults)
    assert open_uploads(s3_server, _name(s3_store, "key")) == []


def test_an_upload_that_fails_leaves_nothing(faulty: FaultyProxy, s3_server: S3Server, s3_store: Store, big_file: Path) -> None:
    """When a part cannot be sent at all, there is no object, and no parts that somebody pays for."""
    faulty.faults = [Fault("refuse", "PUT", "partNumber=2", times=1000)]
    with pytest.raises(SourceUnavailable, match=r"key: the server .* failed 3 times"):
        s3_store.upload("key", big_file)
    assert s3_store.stat("key") is None
    assert open_uploads(s3_server, _name(s3_store, "key")) == []


def test_of_two_uploads_one_wins(s3_server: S3Server, s3_store: Store, big_file: Path) -> None:
    """Large files, too, are written once: the other upload is told, and leaves no parts."""
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(s3_store.upload("key", big_file))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False, False, True]
    assert s3_store.read("key") == big_file.read_bytes()
    assert open_uploads(s3_server, _name(s3_store, "key")) == []


def test_a_file_that_changes_while_it_is_sent(
    s3_server: S3Server, s3_store: Store, big_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose bytes are no longer those that were hashed does not become an object."""
    monkeypatch.setattr(s3, "sha256_of", lambda path: "0" * 64)
    with pytest.raises(DataIntegrityError, match="big changed while it was uploaded"):
        s3_store.upload("key", big_file)
    assert s3_store.stat("key") is None
    assert open_uploads(s3_server, _name(s3_store, "key")) == []


def test_an_object_that_is_replaced_while_it_is_read(
    faulty: FaultyProxy, s3_store: Store, big_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download never mixes two versions of an object: it begins anew with the later one."""
    s3_store.upload("key", big_file)
    later = os.urandom(3 << 20)
    pending = [later]
    ask = faulty.next_fault

    def replace_after_the_first_range(method: str, path: str) -> Fault | None:
        if method == "GET" and len(faulty.seen) > started and pending:
            open_store(s3_store.uri).write("key", pending.pop(), replace=True)
        return ask(method, path)

    started = len(faulty.seen)
    monkeypatch.setattr(faulty, "next_fault", replace_after_the_first_range)
    s3_store.download("key", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == later


@pytest.mark.parametrize("way", ["upload", "download"])
def test_the_server_is_killed(
    s3_server: S3Server, s3_store: Store, big_file: Path, tmp_path: Path, way: str, faulty: FaultyProxy
) -> None:
    """A server that dies in the middle is told as absent, leaving nothing; when it is back, the same call completes."""
    if way == "download":
        s3_store.upload("key", big_file)
    where = {"upload": ("PUT", "partNumber=2"), "download": ("GET", "key")}[way]
    faulty.faults = [Fault("delay", *where, seconds=1.0)]
    kill = threading.Timer(0.5, s3_server.kill)
    kill.start()
    call: Callable[[], object] = {
        "upload": lambda: s3_store.upload("key", big_file),
        "download": lambda: s3_store.download("key", tmp_path / "got" / "file"),
    }[way]
    with pytest.raises(SourceUnavailable, match="key"):
        call()
    kill.join()
    assert not (tmp_path / "got").exists() or files_below(tmp_path / "got") == set()
    s3_server.start()
    assert (s3_store.stat("key") is None) == (way == "upload")
    call()
    assert s3_store.read("key") == big_file.read_bytes()
    if way == "download":
        assert (tmp_path / "got" / "file").read_bytes() == big_file.read_bytes()
    assert open_uploads(s3_server, _name(s3_store, "key")) == []


def _kill_writers(store: Store, folder: Path, kills: int, seed: int) -> None:
    """Send a set of files, kill the sender at random moments, and complete the set."""
    delays = random.Random(seed)  # noqa: S311 - no secret
    sizes = (1000, 2 * PART_BYTES + 7, 3_000_000, 6_000_000)
    contents = {f"shard-{number}": os.urandom(size) for number, size in enumerate(sizes)}
    longest_s = 1.0 if store.local_path("key") is None else 0.1
    (folder / "sent").mkdir()
    for name, content in contents.items():
        (folder / "sent" / name).write_bytes(content)
    command = [sys.executable, "-c", SENDER, store.uri, folder / "sent"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdin is not None
        assert sender.stdout is not None
        for delay_s in [*(delays.uniform(0.001, longest_s) for _ in range(kills)), 0.0]:
            if len(list(store.list())) == len(contents):  # finished before it was killed
                for name in contents:
                    store.delete(f"set/{name}")
            print(delay_s, file=sender.stdin, flush=True)
            assert sender.stdout.readline().strip() in ({"0", f"{-signal.SIGKILL}"} if delay_s else {"0"})
            for info in store.list("set/"):
                assert store.read(info.key) == contents[info.key.removeprefix("set/")]
        sender.stdin.close()
    assert {info.key: info.size_bytes for info in store.list()} == {f"set/{name}": len(contents[name]) for name in contents}
    for name, content in contents.items():
        assert store.read(f"set/{name}") == content


def test_the_writer_is_killed(store: Store, tmp_path: Path) -> None:
    """``kill -9`` at random moments leaves each object whole or absent, and the next run completes the set."""
    _kill_writers(store, tmp_path, kills=4, seed=1)


@pytest.mark.slow
def test_writers_are_killed_for_long(store: Store, tmp_path: Path) -> None:
    """The same, many times."""
    _kill_writers(store, tmp_path, kills=25, seed=2)


def test_parts_of_a_killed_writer_are_removed(s3_server: S3Server, s3_store: Store, big_file: Path) -> None:
    """What a killed writer has sent is no object, and is gone once the same key has been uploaded."""
    client, name = s3_server.client(), _name(s3_store, "key")
    upload = client.create_multipart_upload(Bucket=BUCKET, Key=name)["UploadId"]
    client.upload_part(Bucket=BUCKET, Key=name, UploadId=upload, PartNumber=1, Body=b"x" * PART_BYTES)
    client.close()
    assert (s3_store.stat("key"), list(s3_store.list())) == (None, [])
    assert open_uploads(s3_server, name) == [name]
    assert s3_store.upload("key", big_file) is True
    assert open_uploads(s3_server, name) == []


def test_a_full_disk_of_the_reader(s3_store: Store, tiny_disk: Path, big_file: Path) -> None:
    """A download for which there is no space says so, with the file's name, and leaves nothing."""
    s3_store.upload("key", big_file)
    with pytest.raises(OSError, match=r"No space left on device; free space there .*'.*/deep/file'"):
        s3_store.download("key", tiny_disk / "deep" / "file")
    assert files_below(tiny_disk) == set()


def test_connections_are_not_shared_with_a_forked_child(s3_store: Store) -> None:
    """Parent and child ask the server at the same time, each over connections of its own."""
    s3_store.write("key", b"x" * 1000)
    before = s3._client()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 warns of forks beside threads, as here those of pytest
        child = os.fork()
    if child == 0:  # leaves by os._exit: this is a copy of the test's own process
        try:
            alone = s3._client() is not before
            os._exit(0 if alone and all(s3_store.read("key") == b"x" * 1000 for _ in range(5)) else 1)
        finally:
            os._exit(2)
    for _ in range(5):
        assert s3_store.read("key") == b"x" * 1000
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    forget_client()
