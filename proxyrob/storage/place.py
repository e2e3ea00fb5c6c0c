"""A store and the cache in front of it, as one value that other processes understand."""

from dataclasses import dataclass, replace
from pathlib import Path

from proxyrob.storage.cache import Cache
from proxyrob.storage.store import Store, open_store
from proxyrob.storage.verified import verify_once

DEFAULT_CACHE_BYTES = 50 * 10**9


@dataclass(frozen=True)
class DataPlace:
    """Where a data set lies, and where copies of its files are kept while they are read.

    ``cache`` is a folder of this machine for stores that are not; a local folder is read in place.
    """

    uri: str
    cache: Path | None = None
    cache_bytes: int = DEFAULT_CACHE_BYTES

    @staticmethod
    def of(folder: Path) -> "DataPlace":
        """A local folder."""
        return DataPlace(str(folder.absolute()))

    def open(self) -> Store:
        """The store itself."""
        return open_store(self.uri)

    def is_folder(self, folder: Path) -> bool:
        """Whether this is that local folder."""
        return self.open().uri == str(folder.absolute())

    def below(self, prefix: str) -> "DataPlace":
        """A part of this place."""
        return replace(self, uri=f"{self.uri.rstrip('/')}/{prefix}")

    def file(self, key: str, *, sha256: str, size_bytes: int, remedy: str) -> Path:
        """A local file with the object's content, its hash checked.

        Raises ``DataIntegrityError`` when the object is missing or altered, ending with ``remedy``, and ``ValueError``
        when the place needs a cache and has none.
        """
        store = self.open()
        local = store.local_path(key)
        if local is not None:
            verify_once(local, sha256, remedy)
            return local
        if self.cache is None:
            raise ValueError(f"reading {self.uri} needs a folder for copies: expected DataPlace.cache, got None")
        return Cache(self.cache, self.cache_bytes).fetch(store, key, sha256, size_bytes)
