"""Where data sets lie: one protocol, with a local folder and S3 behind it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from proxyrob.errors import DataIntegrityError
from proxyrob.storage.bounded import SMALL_BYTES
from proxyrob.storage.stage import Report


class ObjectInfo(Report):
    """One object of a store. ``sha256`` is what its writer recorded, ``None`` where nothing is known without reading it."""

    key: str
    size_bytes: int
    sha256: str | None


class Store(Protocol):
    """Objects by key (``samples/ab12/shard-000000.npy``), each there whole or not at all.

    Every method raises ``SourceUnavailable`` when the store does not answer in time, however often it was asked (the same
    call may succeed later), ``PermissionError`` when it refuses the caller, ``FileNotFoundError`` when an object or the
    bucket is not there, ``DataIntegrityError`` when content does not have its hash; the text names the place and the
    remedy.
    """

    @property
    def uri(self) -> str:
        """``s3://bucket/prefix`` or the absolute path of a folder; ``open_store`` gives the same store again."""
        ...

    def below(self, prefix: str) -> "Store":
        """The part of this store whose keys begin with ``prefix/``, as a store of its own."""
        ...

    def stat(self, key: str) -> ObjectInfo | None:
        """What is known of an object without reading it, or ``None`` when there is none."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key begins with ``prefix``, in the order of their keys (``sha256`` may be ``None``)."""
        ...

    def read(self, key: str, *, limit_bytes: int = SMALL_BYTES) -> bytes:
        """The content of a small object, checked against the hash its writer recorded.

        Raises ``DataIntegrityError`` when it is larger than ``limit_bytes``, before it is read.
        """
        ...

    def write(self, key: str, content: bytes, *, replace: bool = False) -> bool:
        """Store a small object with its hash.

        Without ``replace`` an object that is there already is left as it is and the answer is ``False``, also when two
        writers do this at the same moment: exactly one of them gets ``True``.
        """
        ...

    def upload(self, key: str, path: Path, *, replace: bool = False) -> bool:
        """Store a file of any size with its hash; as ``write``."""
        ...

    def download(self, key: str, path: Path, *, sha256: str | None = None, size_bytes: int | None = None) -> None:
        """Fetch an object of any size into the file ``path``, whole or not at all.

        ``sha256`` is the expected hash; without it that which the writer recorded. An object of another size than
        ``size_bytes`` is not fetched.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        ...

    def local_path(self, key: str) -> Path | None:
        """The file behind a key where the store is a folder (whether or not it is there), else ``None``."""
        ...


def require_size(place: str, size_bytes: int, expected_bytes: int | None) -> None:
    """Raise ``DataIntegrityError`` when an object has another size than it has to have, where that is known."""
    if expected_bytes not in {None, size_bytes}:
        raise DataIntegrityError(f"{place} has {size_bytes} bytes, expected {expected_bytes}; delete it and make it again")


def open_store(uri: str | Path) -> Store:
    """The store at ``s3://bucket/prefix``, ``file:///folder`` or a folder's path. Nothing is read or written.

    Raises ``ValueError`` for another kind of address.
    """
    text = str(uri)
    parts = urlsplit(text)
    if parts.scheme == "s3":
        from proxyrob.storage.s3 import S3Store  # boto3 takes half a second, which whoever has a folder need not pay

        return S3Store.at(text)
    from proxyrob.storage.local import LocalStore

    if parts.scheme == "file":
        return LocalStore(Path(parts.path))
    if "://" in text:
        raise ValueError(f"expected s3://bucket/prefix, file:///folder or a folder, got {text!r}")
    return LocalStore(Path(text))
