"""How a store's file gets its name: whole or not at all, though many write the same one at once and any may be killed."""

import errno
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

ABANDONED_S = 24 * 3600  # an unfinished file that nobody has written to for this long belongs to a killed writer
CHUNK_BYTES = 1 << 20
SYNC_BYTES = 32 << 20  # what is written goes to the disk while the rest still comes, not all at the end


class Placing:
    """A file under way: what was written so far is hashed.

    At the end ``done`` says whether the file got its name, and ``status`` what the file system knows of it.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size_bytes = 0
        self._synced_bytes = 0
        self.done = False
        self.status = os.fstat(file.fileno())

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.size_bytes += len(content)
        if self.size_bytes - self._synced_bytes >= SYNC_BYTES:
            os.fsync(self._file.fileno())
            self._synced_bytes = self.size_bytes

    def copy(self, source: IO[bytes]) -> None:
        """Write the rest of an open file."""
        while content := source.read(CHUNK_BYTES):
            self.write(content)

    def restart(self) -> None:
        """Begin anew with an empty file."""
        self._file.seek(0)
        self._file.truncate()
        self._hash = hashlib.sha256()
        self.size_bytes = self._synced_bytes = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def placed(path: Path, *, replace: bool) -> Iterator[Placing]:
    """A temporary file beside ``path`` that is fsynced and gets its name when the block ends well.

    Without ``replace`` a file that is there already stays, and ``done`` is then ``False``; a link, unlike a rename, fails
    when the name is taken, so of two writers exactly one is told ``True``. The temporary name is the writer's own. Raises
    ``OSError`` naming the file when the disk is full; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            placing = Placing(file)
            yield placing
            file.flush()
            os.fsync(file.fileno())
            placing.status = os.fstat(file.fileno())
        if replace:
            temporary.replace(path)
            placing.done = True
        else:
            with suppress(FileExistsError):
                os.link(temporary, path)
                placing.done = True
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} and error.filename is None:
            reason = f"{error.strerror}; free space there or choose another folder"
            raise OSError(error.errno, reason, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder."""
    oldest = time.time() - ABANDONED_S
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") and entry.name.endswith(".part"):
                with suppress(FileNotFoundError):  # finished in this moment
                    if entry.stat(follow_symlinks=False).st_mtime < oldest:
                        Path(entry.path).unlink()


def checked_key(key: str) -> str:
    """The key itself.

    Raises ``ValueError`` for one that is empty, absolute, or has parts that mean another place (``..``) or none.
    """
    if not is_key(key):
        raise ValueError(f"expected a key like samples/ab12/shard-000000.npy, without empty, '.' or '..' parts, got {key!r}")
    return key


def is_key(key: str) -> bool:
    """Whether a key means an object of a store, and nothing outside it."""
    return not any(part in {"", ".", ".."} for part in key.split("/")) and "\\" not in key and "\0" not in key


def is_hidden(key: str) -> bool:
    """Whether a key names something that stores keep for themselves: a part of it begins with a dot."""
    return any(part.startswith(".") for part in key.split("/"))
