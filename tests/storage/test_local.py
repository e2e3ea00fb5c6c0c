"""What only a folder can do wrong: disks that are full, files that killed writers left, links that lead away."""

import errno
import os
import time
from hashlib import sha256
from pathlib import Path

import pytest

from proxyrob.storage.local import LocalStore
from proxyrob.storage.placed import ABANDONED_S
from proxyrob.storage.verified import known_hash
from tests.toys import files_below


def test_a_full_disk_is_told_and_leaves_nothing(tiny_disk: Path, tmp_path: Path) -> None:
    """No space means an ``OSError`` with the file's name, no half file, and the old content where there was some."""
    store = LocalStore(tiny_disk)
    store.write("key", b"old")
    (tmp_path / "big").write_bytes(b"x" * 4_000_000)
    for call in (
        lambda: store.write("key", b"x" * 4_000_000, replace=True),
        lambda: store.upload("other/key", tmp_path / "big"),
        lambda: LocalStore(tmp_path).download("big", tiny_disk / "key"),
    ):
        with pytest.raises(OSError, match=r"No space left on device; free space there .*: '.*key'") as raised:
            call()
        assert raised.value.errno == errno.ENOSPC
    assert store.read("key") == b"old"
    assert files_below(tiny_disk) == {"key"}


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    """A half file is unseen, and removed by the next writer to its folder after a day, not while somebody may write it."""
    store = LocalStore(tmp_path)
    for name, age_s in (("old", ABANDONED_S + 60), ("new", 60)):
        path = tmp_path / f".{name}.01234567.part"
        path.write_bytes(b"half")
        os.utime(path, (0, time.time() - age_s))
    assert list(store.list()) == []
    store.write("key", b"x")
    assert files_below(tmp_path) == {"key", ".new.01234567.part"}


def test_what_was_written_has_a_known_hash(tmp_path: Path) -> None:
    """The hash comes from writing, so that no file is read for it; of a file that was there already nothing is told."""
    store, content = LocalStore(tmp_path / "store"), tmp_path / "content"
    content.write_bytes(b"x")
    (store.folder / "there").mkdir(parents=True)
    (store.folder / "there" / "key").write_bytes(b"there")
    assert not store.upload("there/key", content)
    assert known_hash(store.folder / "there" / "key") is None
    for replace in (False, True):
        assert store.write("written", b"y", replace=replace)
        assert store.upload("uploaded", content, replace=replace)
        assert known_hash(store.folder / "written") == sha256(b"y").hexdigest()
        assert known_hash(store.folder / "uploaded") == sha256(b"x").hexdigest()


def test_a_link_does_not_lead_out(tmp_path: Path) -> None:
    """A link inside the folder is no way to files outside of it."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"x")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="which a link leads out of it"):
        LocalStore(tmp_path / "store").read("link/secret")


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    """A written file has the permissions that any new file gets, so that a group can share a store."""
    (tmp_path / "plain").touch()
    LocalStore(tmp_path).write("key", b"x")
    assert (tmp_path / "key").stat().st_mode == (tmp_path / "plain").stat().st_mode
