"""What every store promises, whatever is behind it."""

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from proxyrob.errors import DataIntegrityError
from proxyrob.storage import s3
from proxyrob.storage.store import Store, open_store
from tests.toys import files_below

KEYS = ("samples/b/shard-000001.npy", "samples/a/shard-000000.npy", "samples/a.json", "labels/é x+y%.parquet")
WRITER = """
import sys, time
from proxyrob.storage.store import open_store
store, start = open_store(sys.argv[1]), float(sys.argv[2])
store.stat("warm")
print("ready", flush=True)
sys.stdin.readline()
for number in range(10):
    print(int(store.write(f"claims/{number}", sys.argv[2].encode() * 1000)), flush=True)
"""


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_what_was_written_is_read(store: Store) -> None:
    """Any bytes, also none, come back, and the store knows their number."""
    for content in (b"", b"x", bytes(range(256)) * 5000):
        assert store.write("a/b.bin", content, replace=True)
        assert store.read("a/b.bin") == content
        info = store.stat("a/b.bin")
        assert info is not None
        assert (info.key, info.size_bytes) == ("a/b.bin", len(content))
        assert info.sha256 in {None, sha256_of(content)}


def test_an_object_is_written_once(store: Store, tmp_path: Path) -> None:
    """Without ``replace`` the first content stays, and the writer is told."""
    (tmp_path / "other").write_bytes(b"other")
    assert store.write("key", b"first") is True
    assert store.write("key", b"second") is False
    assert store.upload("key", tmp_path / "other") is False
    assert store.read("key") == b"first"
    assert store.upload("key", tmp_path / "other", replace=True) is True
    assert store.read("key") == b"other"


def test_files_travel_whole(store: Store, tmp_path: Path) -> None:
    """A file that is larger than one part or range comes back bit for bit, and nothing else is left beside it."""
    content = os.urandom(20_000_001)
    (tmp_path / "sent").write_bytes(content)
    assert store.upload("big/file", tmp_path / "sent") is True
    store.download("big/file", tmp_path / "got" / "file", sha256=sha256_of(content))
    assert (tmp_path / "got" / "file").read_bytes() == content
    assert files_below(tmp_path / "got") == {"file"}
    assert store.read("big/file") == content
    (tmp_path / "empty").touch()
    assert store.upload("empty", tmp_path / "empty")
    store.download("empty", tmp_path / "got" / "file")
    assert (tmp_path / "got" / "file").read_bytes() == b""


def test_objects_are_listed_in_order(store: Store) -> None:
    """All objects below a prefix come in the order of their keys, with their sizes; what is hidden is not listed."""
    for number, key in enumerate(KEYS):
        store.write(key, b"x" * number)
    store.write(".hidden/a", b"")
    store.write("samples/.hidden", b"")
    assert [info.key for info in store.list()] == sorted(KEYS)
    assert [(info.key, info.size_bytes) for info in store.list("samples/a")] == [
        ("samples/a.json", 2),
        ("samples/a/shard-000000.npy", 1),
    ]
    assert [info.key for info in store.list("samples/b/")] == ["samples/b/shard-000001.npy"]
    assert list(store.list("nothing/here")) == []


def test_more_objects_are_listed_than_fit_a_page(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listing goes on where a page of the server ends."""
    for number in range(7):
        s3_store.write(f"{number}", b"")
    client, pages = s3._client(), []
    ask = client.list_objects_v2

    def three_at_a_time(**arguments: object) -> object:
        pages.append(arguments)
        return ask(**arguments, MaxKeys=3)

    monkeypatch.setattr(client, "list_objects_v2", three_at_a_time)
    assert [info.key for info in s3_store.list()] == list("0123456")
    assert len(pages) == 3


def test_what_is_not_there(store: Store, tmp_path: Path) -> None:
    """Nothing is known of a missing object, reading it names it, and removing it is no error."""
    assert store.stat("gone") is None
    with pytest.raises(FileNotFoundError, match="gone is not there"):
        store.read("gone")
    with pytest.raises(FileNotFoundError, match="gone is not there"):
        store.download("gone", tmp_path / "file")
    assert files_below(tmp_path) == set()
    store.delete("gone")


def test_a_deleted_object_is_gone(store: Store) -> None:
    """After ``delete`` there is none, and it can be written again."""
    store.write("key", b"old")
    store.delete("key")
    assert store.stat("key") is None
    assert store.write("key", b"new") is True


def test_a_part_of_a_store_is_a_store(store: Store) -> None:
    """Keys of ``below`` are relative to it, and its address opens the same."""
    part = store.below("samples/ab12")
    part.write("shard.npy", b"x")
    assert store.read("samples/ab12/shard.npy") == b"x"
    assert [info.key for info in part.list()] == ["shard.npy"]
    assert open_store(part.uri).read("shard.npy") == b"x"
    assert open_store(part.uri).uri == part.uri


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../other", "a/../../other", "a//b", "./a", "a/", "a\\b"])
def test_keys_stay_inside(store: Store, key: str, tmp_path: Path) -> None:
    """A key that means another place, or none, is refused by every method."""
    (tmp_path / "file").touch()
    for call in (
        lambda: store.stat(key),
        lambda: store.read(key),
        lambda: store.write(key, b""),
        lambda: store.upload(key, tmp_path / "file"),
        lambda: store.download(key, tmp_path / "file"),
        lambda: store.delete(key),
        lambda: store.local_path(key),
    ):
        with pytest.raises(ValueError, match="expected a key like"):
            call()


def test_content_with_another_hash_is_refused(store: Store, tmp_path: Path) -> None:
    """A download that is not what the caller expects leaves the old file alone; both hashes are told."""
    store.write("key", b"content")
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(DataIntegrityError, match=f"key is damaged: expected sha256 {'0' * 64}, got {sha256_of(b'content')}"):
        store.download("key", tmp_path / "file", sha256="0" * 64)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert not [name for name in files_below(tmp_path) if name.endswith(".part")]


def test_a_store_travels_to_another_process(store: Store) -> None:
    """A pickled store reads and writes the same objects."""
    store.write("key", b"x")
    assert pickle.loads(pickle.dumps(store)).read("key") == b"x"  # noqa: S301 - as multiprocessing does


def test_of_two_writers_one_wins(store: Store) -> None:
    """Of two processes that write the same new objects, exactly one is told that it did, and its content is there."""
    command = [sys.executable, "-c", WRITER, store.uri]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, str(number)], **pipes) for number in (1, 2)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    answers = [writer.communicate(timeout=60)[0].split() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    for number, (first, second) in enumerate(zip(*answers, strict=True)):
        assert {first, second} == {"0", "1"}
        assert store.read(f"claims/{number}") == (b"1" if first == "1" else b"2") * 1000


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3://a", "s3://bucket name/key", "http://host/folder", "gs://bucket"])
def test_other_addresses_are_refused(uri: str) -> None:
    """What is neither a folder nor a bucket is refused, saying what is expected."""
    with pytest.raises(ValueError, match="expected s3://bucket/prefix"):
        open_store(uri)


def test_addresses_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may be given as path, relative path or ``file://``, and nothing is made by opening it."""
    monkeypatch.chdir(tmp_path)
    for uri in (tmp_path / "a", "a", f"file://{tmp_path}/a"):
        assert open_store(uri).uri == str(tmp_path / "a")
    assert not (tmp_path / "a").exists()
