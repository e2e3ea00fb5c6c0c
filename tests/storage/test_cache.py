"""Copies of remote objects: whole, few enough, and shared by many processes."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proxyrob.errors import DataIntegrityError
from proxyrob.storage.cache import Cache
from proxyrob.storage.local import LocalStore
from proxyrob.storage.store import Store
from tests.toys import damage, files_below

READER = """
import hashlib, random, sys
from pathlib import Path
from proxyrob.storage.cache import Cache
from proxyrob.storage.local import LocalStore

class Counted(LocalStore):
    def download(self, key, path, *, sha256=None, size_bytes=None):
        super().download(key, path, sha256=sha256, size_bytes=size_bytes)
        print(key, flush=True)

store, cache, order = Counted(Path(sys.argv[1])), Cache(Path(sys.argv[2]), int(sys.argv[3])), random.Random(int(sys.argv[4]))
wanted = [(path.name, path.read_bytes()) for path in sorted(store.folder.iterdir())]
for name, content in order.sample(wanted * int(sys.argv[5]), len(wanted) * int(sys.argv[5])):
    sha256 = hashlib.sha256(content).hexdigest()
    for attempt in range(20):
        try:
            assert cache.fetch(store, name, sha256, len(content)).read_bytes() == content
            break
        except FileNotFoundError:  # so small a cache that the others needed the space before it was read
            assert attempt < 19
"""


def put(store: Store, key: str, content: bytes) -> tuple[str, str, int]:
    """Write an object; its key, hash and size."""
    store.write(key, content)
    return key, hashlib.sha256(content).hexdigest(), len(content)


def content_bytes(folder: Path) -> int:
    """The size of all objects in a cache, finished or not."""
    return sum(path.stat().st_size for path in folder.glob("??/*") if not path.name.endswith((".sha256", ".lock", ".room")))


def test_an_object_is_fetched_once(store: Store, tmp_path: Path) -> None:
    """The second time the store is not needed; the file lies under its hash and cannot be written by accident."""
    object_ = put(store, "key", b"content")
    cache = Cache(tmp_path / "cache", 100)
    path = cache.fetch(store, *object_)
    assert path == tmp_path / "cache" / object_[1][:2] / object_[1]
    assert path.read_bytes() == b"content"
    assert path.stat().st_mode & 0o222 == 0
    store.delete("key")
    assert Cache(tmp_path / "cache", 100).fetch(store, *object_) == path


@pytest.mark.parametrize("harm", ["altered", "truncated", "emptied", "removed"])
def test_a_damaged_copy_is_fetched_again(tmp_path: Path, harm: str) -> None:
    """Whatever happened to the file since, the caller gets the object's content."""
    store = LocalStore(tmp_path / "store")
    object_ = put(store, "key", b"content")
    cache = Cache(tmp_path / "cache", 100)
    path = cache.fetch(store, *object_)
    if harm == "altered":
        damage(path)
    elif harm == "removed":
        path.unlink()
    else:
        path.chmod(0o644)
        path.write_bytes(b"conten" if harm == "truncated" else b"")
    assert cache.fetch(store, *object_).read_bytes() == b"content"


def test_the_oldest_copies_make_room(tmp_path: Path) -> None:
    """The cache holds no more than its limit; what was used last stays."""
    store, cache = LocalStore(tmp_path / "store"), Cache(tmp_path / "cache", 300)
    objects = [put(store, f"{number}", bytes([number]) * 100) for number in range(5)]
    paths = []
    for object_ in objects[:3]:
        paths.append(cache.fetch(store, *object_))
        time.sleep(0.01)
    cache.fetch(store, *objects[0])
    held = paths[1].open("rb")
    for object_ in objects[3:]:
        paths.append(cache.fetch(store, *object_))
        assert content_bytes(tmp_path / "cache") <= 300
    assert [path.exists() for path in paths] == [True, False, False, True, True]
    with held:
        assert held.read() == b"\x01" * 100, "a file that somebody has open stays readable"


def test_what_cannot_fit_is_refused(tmp_path: Path) -> None:
    """An object larger than the limit is refused before anything is removed or fetched."""
    store, cache = LocalStore(tmp_path / "store"), Cache(tmp_path / "cache", 99)
    small, large = put(store, "small", b"x"), put(store, "large", b"x" * 100)
    kept = cache.fetch(store, *small)
    with pytest.raises(ValueError, match=r"large of .* has 100 bytes, and the cache .* may hold 99; raise the cache's limit"):
        cache.fetch(store, *large)
    assert kept.exists()
    with pytest.raises(ValueError, match="expected a sha256 as 64 hexadecimal digits"):
        cache.fetch(store, "small", "../../etc/passwd", 1)


def test_another_content_is_not_kept(tmp_path: Path) -> None:
    """An object that is not what its manifest says is refused, and leaves neither file nor reserved space."""
    store, cache = LocalStore(tmp_path / "store"), Cache(tmp_path / "cache", 100)
    key, sha256, size_bytes = put(store, "key", b"content")
    with pytest.raises(DataIntegrityError, match="key is damaged"):
        cache.fetch(store, key, "0" * 64, size_bytes)
    with pytest.raises(DataIntegrityError, match=r"key has 7 bytes, expected 8; delete it"):
        cache.fetch(store, key, sha256, 8)
    with pytest.raises(FileNotFoundError):
        cache.fetch(store, "gone", "1" * 64, 1)
    assert {name for name in files_below(tmp_path / "cache") if not name.endswith(".lock")} == set()


def test_space_that_a_killed_process_reserved_is_free_again(tmp_path: Path) -> None:
    """What a killed download left does not count, and is removed."""
    store, cache = LocalStore(tmp_path / "store"), Cache(tmp_path / "cache", 100)
    (tmp_path / "cache" / "ff").mkdir(parents=True)
    for name in (".ff00.room", ".ff00.01234567.part"):
        (tmp_path / "cache" / "ff" / name).write_bytes(b"x" * 90)
    cache.fetch(store, *put(store, "key", b"content" * 10))
    assert {path.name for path in (tmp_path / "cache" / "ff").iterdir()} <= {".lock"}


@pytest.mark.parametrize(("limit_bytes", "times"), [(10**9, 1), (2_500_000, 4)], ids=["roomy", "tight"])
def test_many_processes_share_a_cache(tmp_path: Path, limit_bytes: int, times: int) -> None:
    """Four processes at once get right contents; with room enough each object is fetched once, else the limit is kept."""
    (tmp_path / "store").mkdir()
    for number in range(8):
        (tmp_path / "store" / f"{number}").write_bytes(os.urandom(300_000))
    command = [sys.executable, "-c", READER, tmp_path / "store", tmp_path / "cache", str(limit_bytes)]
    readers = [
        subprocess.Popen([*command, str(seed), str(times)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in range(4)
    ]
    most = 0
    while any(reader.poll() is None for reader in readers):
        try:
            most = max(most, content_bytes(tmp_path / "cache"))
        except FileNotFoundError:  # removed while they were counted
            continue
        time.sleep(0.01)
    fetched: list[str] = []
    for reader in readers:
        told, errors = reader.communicate()
        assert reader.returncode == 0, errors
        fetched += told.split()
    assert most <= limit_bytes
    if times == 1:
        assert sorted(fetched) == [f"{number}" for number in range(8)]
    else:
        assert len(fetched) >= 8
