"""Hashes of large files, read once for each identity of a file."""

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from proxyrob.errors import DataIntegrityError
from proxyrob.storage.bounded import parse_json, read_small
from proxyrob.storage.files import sha256_of


def hash_once(path: Path) -> str:
    """The sha256 of a file's content, read only when the file is another than at the last call.

    The result is kept in ``.NAME.sha256`` beside the file, with the size, time of change and inode it holds for. A file that
    was written anew is therefore noticed, and bits that rot on an idle disk are not: ``sha256_of`` reads in any case.
    """
    identity = _identity(path.stat())
    known = _recorded(path, identity)
    if known is not None:
        return known
    sha256 = sha256_of(path)
    if _identity(path.stat()) == identity:
        _record(path, identity, sha256)
    return sha256


def remember_hash(path: Path, sha256: str, status: os.stat_result) -> None:
    """Keep the hash of a file that the caller has just written and hashed, so that ``hash_once`` need not read it.

    ``status`` is that of the caller's own file: of another that has taken its name since, nothing is believed.
    """
    _record(path, _identity(status), sha256)


def forget_hash(path: Path) -> None:
    """Drop what is kept of a file, because its content is doubted or the file is gone."""
    with suppress(OSError):
        _sidecar(path).unlink(missing_ok=True)


def known_hash(path: Path) -> str | None:
    """The hash that is kept for the file as it is now, or ``None``; the content is not read."""
    return _recorded(path, _identity(path.stat()))


def verify_once(path: Path, sha256: str, remedy: str) -> None:
    """Check a file against its recorded hash, reading it only when it is another than at the last check.

    Raises ``DataIntegrityError`` naming the file, both hashes and the remedy.
    """
    if not path.is_file():
        raise DataIntegrityError(f"{path} is missing (its recorded sha256 is {sha256}); {remedy}")
    found = hash_once(path)
    if found != sha256:
        raise DataIntegrityError(f"{path} is damaged: expected sha256 {sha256}, got {found}; {remedy}")


def _sidecar(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def _identity(status: os.stat_result) -> dict[str, int]:
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _recorded(path: Path, identity: dict[str, int]) -> str | None:
    try:
        sidecar = _sidecar(path)
        content = parse_json(read_small(sidecar), str(sidecar), "it is made again")
    except (OSError, DataIntegrityError):  # none yet, or torn by a crash: the file itself is read
        return None
    if not isinstance(content, dict):
        return None
    sha256 = content.pop("sha256", None)
    return sha256 if content == identity and isinstance(sha256, str) else None


def _record(path: Path, identity: dict[str, int], sha256: str) -> None:
    """Best effort: in a folder that cannot be written, or on a full disk, the file is read again next time."""
    with suppress(OSError):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({**identity, "sha256": sha256}, file)
            Path(name).replace(_sidecar(path))
        except OSError:
            Path(name).unlink(missing_ok=True)
