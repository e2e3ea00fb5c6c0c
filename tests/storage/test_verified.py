"""Hashes that are read once."""

import json
import os
from pathlib import Path

import pytest

from proxyrob.errors import DataIntegrityError
from proxyrob.storage import verified
from proxyrob.storage.files import sha256_of, verify_file
from proxyrob.storage.verified import hash_once, known_hash, remember_hash, verify_once
from tests.toys import damage


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read in whole."""
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return sha256_of(path)

    monkeypatch.setattr(verified, "sha256_of", counted)
    return read


def test_a_file_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    """The second question costs no reading, and what is kept is hidden."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert hash_once(path) == hash_once(path) == known_hash(path) == sha256_of(path)
    assert len(reads) == 1
    assert {found.name for found in tmp_path.iterdir()} == {"file", ".file.sha256"}


def test_another_file_is_read_again(tmp_path: Path, reads: list[Path]) -> None:
    """Another size, time of change or inode means another content, and nothing is believed of it."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    hash_once(path)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert known_hash(path) is None
    hash_once(path)
    (tmp_path / "other").write_bytes(b"CONTENT")
    os.utime(tmp_path / "other", ns=(0, path.stat().st_mtime_ns))
    (tmp_path / "other").replace(path)
    assert hash_once(path) == sha256_of(path)
    path.write_bytes(b"longer content")
    assert hash_once(path) == sha256_of(path)
    assert len(reads) == 4


def test_what_a_writer_has_hashed_is_not_read(tmp_path: Path, reads: list[Path]) -> None:
    """``remember_hash`` is believed as long as the file is the same."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    remember_hash(path, sha256_of(path), path.stat())
    assert hash_once(path) == sha256_of(path)
    assert reads == []


def test_the_hash_of_a_file_that_was_replaced_is_not_believed(tmp_path: Path, reads: list[Path]) -> None:
    """Of two writers of one name, what the first one tells afterwards of its own file says nothing of the second one's."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    status, sha256 = path.stat(), sha256_of(path)
    (tmp_path / "other").write_bytes(b"CONTENT")
    (tmp_path / "other").replace(path)
    remember_hash(path, sha256, status)
    assert hash_once(path) == sha256_of(path) != sha256
    assert len(reads) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"sha256": 5}', b"\xff", json.dumps({"size": 7}).encode()])
def test_what_is_kept_may_be_torn(tmp_path: Path, reads: list[Path], content: bytes) -> None:
    """A note that a crash has torn, or that means nothing, is written anew."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    (tmp_path / ".file.sha256").write_bytes(content)
    assert hash_once(path) == hash_once(path) == sha256_of(path)
    assert len(reads) == 1


def test_a_folder_that_cannot_be_written(reads: list[Path]) -> None:
    """Where nothing can be kept (here: the kernel's own files), the file is read each time."""
    path = Path("/proc/version")
    assert hash_once(path) == hash_once(path) == sha256_of(path)
    assert len(reads) == 2


def test_a_file_is_verified_once(tmp_path: Path, reads: list[Path]) -> None:
    """A whole file is read at the first check, a damaged one is told with the same text as by ``verify_file``."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    expected = sha256_of(path)
    verify_once(path, expected, "make it again")
    verify_once(path, expected, "make it again")
    assert len(reads) == 1
    damage(path)
    for _ in range(2):
        with pytest.raises(DataIntegrityError) as ours:
            verify_once(path, expected, "make it again")
        with pytest.raises(DataIntegrityError) as plain:
            verify_file(path, expected, "make it again")
        assert str(ours.value) == str(plain.value)
    path.unlink()
    with pytest.raises(DataIntegrityError, match=rf"file is missing \(its recorded sha256 is {expected}\); make it again"):
        verify_once(path, expected, "make it again")
