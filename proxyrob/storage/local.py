"""A local folder as a store."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from proxyrob.storage.files import verify_file
from proxyrob.storage.store import ObjectInfo


class LocalStore:
    """A folder; objects are its files. Hashes are not recorded beside them: manifests and records have them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    @property
    def uri(self) -> str:
        return str(self.folder)

    def below(self, prefix: str) -> "LocalStore":
        return LocalStore(self._path(prefix))

    def stat(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        return ObjectInfo(key=key, size_bytes=path.stat().st_size, sha256=None) if path.is_file() else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        start = self.folder / prefix.rpartition("/")[0]
        found = (path for path in start.rglob("*") if path.is_file() and not path.name.startswith("."))
        for key in sorted(path.relative_to(self.folder).as_posix() for path in found):
            if key.startswith(prefix):
                yield ObjectInfo(key=key, size_bytes=(self.folder / key).stat().st_size, sha256=None)

    def read(self, key: str) -> bytes:
        path = self._path(key)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there")
        return path.read_bytes()

    def write(self, key: str, content: bytes, *, replace: bool = False) -> bool:
        with _placed(self._path(key), replace) as (file, answer):
            file.write(content)
        return answer[0]

    def upload(self, key: str, path: Path, *, replace: bool = False) -> bool:
        with _placed(self._path(key), replace) as (file, answer), path.open("rb") as content:
            shutil.copyfileobj(content, file, 1 << 20)
        return answer[0]

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        source = self._path(key)
        if not source.is_file():
            raise FileNotFoundError(f"{source} is not there")
        if sha256 is not None:
            verify_file(source, sha256, "delete it and make it again")
        with source.open("rb") as content, _placed(path, replace=True) as (file, _):
            shutil.copyfileobj(content, file, 1 << 20)

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def _path(self, key: str) -> Path:
        path = self.folder / key
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"expected a key below {self.folder}, got {key!r}")
        return path


@contextmanager
def _placed(path: Path, replace: bool) -> Iterator[tuple[IO[bytes], list[bool]]]:
    """A temporary file beside ``path`` that gets its name when the block ends well; the list says whether it did.

    The temporary name is the writer's own, because many may write the same object at once. (A link, unlike a rename, fails
    when the name is taken.)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    temporary, answer = Path(name), [True]
    try:
        with os.fdopen(handle, "wb") as file:
            yield file, answer
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            try:
                os.link(temporary, path)
            except FileExistsError:
                answer[0] = False
    finally:
        temporary.unlink(missing_ok=True)
