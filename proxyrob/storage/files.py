"""Files that appear whole or not at all, and are recognised by their hash."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from proxyrob.errors import DataIntegrityError
from proxyrob.storage.bounded import PARSING, as_frame, first_fault, open_table, read_npy_header, read_table

M = TypeVar("M", bound=BaseModel)

HEADER = b"proxyrob"
REMEDY = "delete it and make it again"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends without error it is fsynced and renamed to ``path``.

    The temporary name is fixed, so that what a killed writer left is overwritten by the next one. Two writers of one file
    at once must exclude each other, as stages do by their lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole."""
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON that a person can read."""
    write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a plain ``.npy``; arrays of objects are refused, because reading them would mean unpickling."""
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: Path, mapped: bool = False) -> np.ndarray:
    """Read a plain ``.npy``, never unpickling; ``mapped`` leaves the content on disk.

    Raises ``DataIntegrityError`` when it is none, or its header promises another size.
    """
    with path.open("rb") as file:
        read_npy_header(file, str(path), path.stat().st_size)
    with PARSING:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)


def write_table(path: Path, table: pd.DataFrame, header: dict[str, Any] | None = None) -> None:
    """Write a table as parquet; ``header`` is kept as JSON in the file's own metadata."""
    content = pa.Table.from_pandas(table, preserve_index=False)
    if header is not None:
        content = content.replace_schema_metadata(
            {**(content.schema.metadata or {}), HEADER: json.dumps(header, sort_keys=True)}
        )
    with written_whole(path) as temporary:
        pq.write_table(content, temporary)


def read_frame(path: Path, remedy: str = REMEDY) -> pd.DataFrame:
    """A table as it was written.

    Raises ``DataIntegrityError``, ending with ``remedy``, when it cannot be read or would fill memory.
    """
    return as_frame(read_table(path, str(path), remedy), str(path), remedy)


def read_header(path: Path, kind: type[M], remedy: str = REMEDY) -> M:
    """The header of a table.

    Raises ``DataIntegrityError``, ending with ``remedy``, when it has none, or one of another kind.
    """
    with open_table(path, str(path), remedy) as file:
        content = (file.schema_arrow.metadata or {}).get(HEADER)
    if content is None:
        raise DataIntegrityError(f"{path} has no header of proxyrob; it was not written by this program")
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise DataIntegrityError(f"{path} has another header than expected ({first_fault(error)}); {remedy}") from error


def sha256_of(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_file(path: Path, sha256: str, remedy: str) -> None:
    """Check a file against its recorded hash.

    Raises ``DataIntegrityError`` naming the file, both hashes and the remedy.
    """
    if not path.is_file():
        raise DataIntegrityError(f"{path} is missing (its recorded sha256 is {sha256}); {remedy}")
    found = sha256_of(path)
    if found != sha256:
        raise DataIntegrityError(f"{path} is damaged: expected sha256 {sha256}, got {found}; {remedy}")


def require_writable(folder: Path) -> None:
    """Make ``folder`` if it is not there and try to write into it.

    Raises ``PermissionError`` or ``NotADirectoryError`` saying which folder cannot be used and what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{folder} cannot hold results because a file is in the way; choose another folder") from error
    except OSError as error:
        raise PermissionError(f"{folder} cannot be written ({error.strerror}); choose another folder or free it") from error
