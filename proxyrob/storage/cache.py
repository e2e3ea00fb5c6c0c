"""Copies of remote objects on this machine's disk, by the hash of their content."""

import os
import re
import time
from pathlib import Path

from filelock import FileLock, Timeout

from proxyrob.storage.store import Store
from proxyrob.storage.verified import forget_hash, hash_once, remember_hash

WAIT_S = 0.1


class Cache:
    """A folder of objects ``ab/abcdef…`` that many processes fill and read at once, never larger than its limit.

    A file that is there is used while its hash is right; a damaged one is fetched again. The least recently used files make
    room for new ones, so the limit has to hold what all processes use at a time. A file that is removed while somebody has
    it open, or mapped, stays readable to them.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder.absolute()
        self.limit_bytes = limit_bytes

    def fetch(self, store: Store, key: str, sha256: str, size_bytes: int) -> Path:
        """The local file with the content of an object, which must have the given hash and size.

        Of several processes that want the same object, one downloads it. Raises ``ValueError`` when the object alone is
        larger than the limit, ``DataIntegrityError`` when the store's object has another hash or size, and what
        ``store.download`` raises.
        """
        if re.fullmatch("[0-9a-f]{64}", sha256) is None:
            raise ValueError(f"expected a sha256 as 64 hexadecimal digits, got {sha256!r}")
        if size_bytes > self.limit_bytes:
            raise ValueError(
                f"{key} of {store.uri} has {size_bytes} bytes, and the cache {self.folder} may hold {self.limit_bytes}; "
                "raise the cache's limit"
            )
        path = self.folder / sha256[:2] / sha256
        if not _is_whole(path, sha256):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.parent / ".lock"):
                if not _is_whole(path, sha256):
                    self._download(store, key, path, sha256, size_bytes)
        return path

    def _download(self, store: Store, key: str, path: Path, sha256: str, size_bytes: int) -> None:
        """Needs the lock of the file's folder."""
        _remove(path)
        room = path.with_name(f".{path.name}.room")
        self._make_room(room, size_bytes)
        try:
            store.download(key, path, sha256=sha256, size_bytes=size_bytes)
            status = path.stat()
            path.chmod(0o444)
            remember_hash(path, sha256, status)
        finally:
            room.unlink(missing_ok=True)

    def _make_room(self, room: Path, size_bytes: int) -> None:
        """Remove files until one of ``size_bytes`` fits, and set its space aside by the sparse file ``room``.

        Waits while what other processes are downloading leaves no space.
        """
        while True:
            with FileLock(self.folder / ".lock"):
                reserved = sum(_size(other) for other in self.folder.glob("*/.*.room") if not _is_abandoned(other, room.parent))
                if reserved + size_bytes <= self.limit_bytes:
                    self._evict(self.limit_bytes - reserved - size_bytes)
                    with room.open("wb") as file:
                        file.truncate(size_bytes)
                    return
            time.sleep(WAIT_S)

    def _evict(self, keep_bytes: int) -> None:
        """Remove the least recently used files until at most ``keep_bytes`` are left."""
        files = []
        for path in self.folder.glob("[!.]*/[!.]*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # found damaged by another process in this moment
                continue
            files.append((status.st_atime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= keep_bytes:
                break
            _remove(path)
            total -= size


def _is_whole(path: Path, sha256: str) -> bool:
    """Whether the file is there with this content; if so it is the most recently used one."""
    try:
        if hash_once(path) != sha256:
            return False
        # File systems update this time once a day or never; the other one identifies the content that was hashed.
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


def _is_abandoned(room: Path, own: Path) -> bool:
    """Whether whoever set this space aside was killed; what it left is then removed.

    A process keeps the lock of a folder while it downloads into it, and ``own`` is the one whose lock the caller has.
    """
    if room.parent == own:
        _clear(own)
        return True
    try:
        with FileLock(room.parent / ".lock", timeout=0):
            _clear(room.parent)
    except Timeout:
        return False
    return True


def _clear(folder: Path) -> None:
    for pattern in (".*.room", ".*.part"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # finished in this moment
        return 0


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    forget_hash(path)
