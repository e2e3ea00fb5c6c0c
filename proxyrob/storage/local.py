"""A local folder as a store."""

import os
from collections.abc import Iterator
from pathlib import Path

from proxyrob.errors import DataIntegrityError
from proxyrob.storage.bounded import SMALL_BYTES, read_small
from proxyrob.storage.placed import Placing, checked_key, is_key, placed
from proxyrob.storage.store import ObjectInfo, require_size
from proxyrob.storage.verified import forget_hash, known_hash, remember_hash


class LocalStore:
    """A folder; objects are its files, hidden ones excepted.

    The hash of what was written through it is kept in a hidden file beside it, where ``hash_once`` finds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    @property
    def uri(self) -> str:
        return str(self.folder)

    def below(self, prefix: str) -> "LocalStore":
        return LocalStore(self._path(prefix.rstrip("/")))

    def stat(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        try:
            if not path.is_file():
                return None
            return ObjectInfo(key=key, size_bytes=path.stat().st_size, sha256=known_hash(path))
        except FileNotFoundError:  # removed in this moment
            return None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        parent = prefix.rpartition("/")[0]
        start = self._path(parent) if parent else self.folder
        keys = []
        for folder, names, files in os.walk(start):
            names[:] = [name for name in names if not name.startswith(".")]
            below = Path(folder).relative_to(self.folder)
            keys += [(below / name).as_posix() for name in files if not name.startswith(".")]
        for key in sorted(keys):
            if key.startswith(prefix) and is_key(key) and (info := self.stat(key)) is not None:
                yield info

    def read(self, key: str, *, limit_bytes: int = SMALL_BYTES) -> bytes:
        return read_small(self._file(key), limit_bytes)

    def write(self, key: str, content: bytes, *, replace: bool = False) -> bool:
        path = self._path(key)
        with placed(path, replace=replace) as placing:
            placing.write(content)
        return _remembered(path, placing)

    def upload(self, key: str, path: Path, *, replace: bool = False) -> bool:
        target = self._path(key)
        with path.open("rb") as content, placed(target, replace=replace) as placing:
            placing.copy(content)
        return _remembered(target, placing)

    def download(self, key: str, path: Path, *, sha256: str | None = None, size_bytes: int | None = None) -> None:
        source = self._file(key)
        require_size(str(source), source.stat().st_size, size_bytes)
        with source.open("rb") as content, placed(path, replace=True) as placing:
            placing.copy(content)
            if sha256 is not None and placing.sha256 != sha256:
                raise DataIntegrityError(
                    f"{source} is damaged: expected sha256 {sha256}, got {placing.sha256}; delete it and make it again"
                )

    def delete(self, key: str) -> None:
        path = self._path(key)
        path.unlink(missing_ok=True)
        forget_hash(path)

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def _file(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there")
        return path

    def _path(self, key: str) -> Path:
        path = self.folder / checked_key(key)
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"expected a key below {self.folder}, got {key!r}, which a link leads out of it")
        return path


def _remembered(path: Path, placing: Placing) -> bool:
    """Whether the file got its name; if so its hash, which is known from writing it, is kept."""
    if placing.done:
        remember_hash(path, placing.sha256, placing.status)
    return placing.done
