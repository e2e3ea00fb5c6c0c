"""Files that anybody may have written: what a header promises is compared with what is there before memory is spent on it."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError
from pydantic_core import from_json

from proxyrob.errors import DataIntegrityError

SMALL_BYTES = 64 << 20
"""A record, an index or a manifest that is larger is none: 300,000 shards need this much."""

FREE_BYTES = 256 << 20
MOST_EXPANDED = 500
"""What a file promises may be this much in any case, and else so many times its size: dSprites, black but for a few pixels,
is 112 times its file, and zip's own compression gives 1,032 where there is nothing to compress."""

MOST_PIXELS = 4096 * 4096
"""Of one image: what is larger was not meant for a network, and a batch of it is in no memory."""

HEADER_BYTES = 10_000
"""numpy's own limit, which it applies only after it has read a header of whatever length."""

PARSING = Lock()
"""numpy parses a file's header as Python, and CPython 3.11 counts the depth of a syntax tree for all threads together: two
that parse at once can fail with ``SystemError: AST constructor recursion depth mismatch``."""

VALUE_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
TEXT_BYTES = 16
"""At most what a value takes in memory beside its text."""


def read_small(path: Path, limit_bytes: int = SMALL_BYTES) -> bytes:
    """The content of a file that has to be small.

    Raises ``DataIntegrityError`` when it is not, before it is read.
    """
    require_small(str(path), path.stat().st_size, limit_bytes)
    return path.read_bytes()


def require_small(name: str, size_bytes: int, limit_bytes: int = SMALL_BYTES) -> None:
    """Raise ``DataIntegrityError`` when something that has to be small is not."""
    if size_bytes > limit_bytes:
        raise DataIntegrityError(
            f"{name} has {size_bytes} bytes, and at most {limit_bytes} are read of such a file: it is damaged or another file; "
            "delete it, or put the right one in its place"
        )


def parse_json(content: bytes, where: str, remedy: str) -> Any:
    """Values from JSON.

    Raises ``DataIntegrityError`` for anything else, and for what is nested too deep.
    """
    try:
        return from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise DataIntegrityError(f"{where} cannot be read as JSON ({error}); {remedy}") from error


def require_plausible(name: str, promised_bytes: int, size_bytes: int) -> None:
    """Raise ``DataIntegrityError`` when a file promises so much more than it holds that it was made to fill memory or disks."""
    if promised_bytes > max(FREE_BYTES, MOST_EXPANDED * size_bytes):
        raise DataIntegrityError(
            f"{name} holds {size_bytes} bytes and promises {promised_bytes}, more than {MOST_EXPANDED} times as many: it is "
            "damaged, or made to fill memory; if its content is right, save it without compression"
        )


def require_image_size(name: str, height: int, width: int) -> None:
    """Raise ``DataIntegrityError`` when an image, or each of several, has more pixels than are read."""
    if height * width > MOST_PIXELS:
        raise DataIntegrityError(
            f"{name} has {height}×{width} pixels, and images of at most {MOST_PIXELS} pixels (4096×4096) are read; resize or "
            "remove it"
        )


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong with a file's content, in one line: where it is, and what was expected."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg']}" if where else fault["msg"].removeprefix("Value error, ")


class NpyHeader(NamedTuple):
    """What lies in an ``.npy`` file from byte ``offset`` on."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype
    offset: int


def read_npy_header(file: io.BufferedIOBase, name: str, size_bytes: int) -> NpyHeader:
    """The header of an array; ``size_bytes`` is what header and content take together.

    Raises ``DataIntegrityError`` for pickled objects, for a header that promises another size, and for what is no header.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version not in {(1, 0), (2, 0), (3, 0)}:
            raise ValueError(f"version {version} of the format is not known")  # noqa: TRY301  (as numpy says the rest)
        field = file.read(2 if version == (1, 0) else 4)
        length = int.from_bytes(field, "little")
        if length > HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes, at most {HEADER_BYTES} are read")  # noqa: TRY301
        header = io.BytesIO(field + file.read(length))
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with PARSING:
            shape, is_fortran, dtype = read(header)
    except (ValueError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError) as error:
        raise DataIntegrityError(f"{name} is not a whole .npy array ({error}); copy or make it again") from error
    if dtype.hasobject:
        raise DataIntegrityError(
            f"{name} holds pickled Python objects; reading them would run whatever code the file contains, so they are never "
            "unpickled. Save plain numbers: numpy.savez(file, image=uint8 array, label=int64 array)"
        )
    offset = len(np.lib.format.magic(*version)) + len(field) + length
    promised = offset + math.prod(shape) * dtype.itemsize
    if promised != size_bytes or min(shape, default=0) < 0:
        raise DataIntegrityError(
            f"{name} has {size_bytes} bytes, but its header promises {promised} (shape {shape}, {dtype}); it is cut off or "
            "was put together wrongly: copy or make it again"
        )
    return NpyHeader(shape, is_fortran, dtype, offset)


@contextmanager
def open_table(source: Path | bytes, where: str, remedy: str) -> Iterator[pq.ParquetFile]:
    """A parquet file, from disk or from memory, whose footer promises no more than such a file can hold.

    Raises ``DataIntegrityError``, ending with ``remedy``, when it cannot be read, also for what is read inside the block.
    """
    with explain_parquet(where, remedy), pq.ParquetFile(_opened(source)) as file:
        size_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
        require_plausible(where, _promised_bytes(file.metadata), size_bytes)
        yield file


@contextmanager
def explain_parquet(where: str, remedy: str) -> Iterator[None]:
    """What a damaged parquet file makes pyarrow raise, as an error that names it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataIntegrityError(f"{where} cannot be read as parquet ({error}); {remedy}") from error


def read_table(
    source: Path | bytes, where: str, remedy: str, columns: Sequence[str] | None = None, group: int | None = None
) -> pa.Table:
    """A table of numbers, texts and lists of numbers, or some of its columns, or one group of its rows.

    Raises ``DataIntegrityError``, ending with ``remedy``, when it cannot be read, has other columns or would fill memory.
    """
    with open_table(source, where, remedy) as file:
        schema, metadata = file.schema_arrow, file.metadata
    names = schema.names if columns is None else list(columns)
    for name in names:
        if name not in schema.names or not _is_plain(schema.field(name).type):
            found = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise DataIntegrityError(f"{where} has the columns {found}, which is no table of this program's; {remedy}")
    texts = [name for name in names if _is_text(schema.field(name).type)]
    with explain_parquet(where, remedy):
        # texts as indices into those that occur: a few bytes may say that a long one is in every row
        with pq.ParquetFile(_opened(source), metadata=metadata, read_dictionary=texts) as file:
            table = file.read(names) if group is None else file.read_row_group(group, names)
        size_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
        require_plausible(where, sum(_text_bytes(table[name]) for name in texts), size_bytes)
        for name in texts:
            place = table.schema.get_field_index(name)
            table = table.set_column(place, schema.field(name), table[name].cast(schema.field(name).type))
    return table.replace_schema_metadata(schema.metadata)


def as_frame(table: pa.Table, where: str, remedy: str) -> pd.DataFrame:
    """A table for pandas, with the types that it was written with.

    Raises ``DataIntegrityError`` when what it says of these makes no sense.
    """
    try:
        return table.to_pandas()
    except (pa.ArrowException, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataIntegrityError(f"{where} cannot be read as a table ({error!r}); {remedy}") from error


def _opened(source: Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _promised_bytes(metadata: pq.FileMetaData) -> int:
    """The memory that the values of a file take, by its footer; of texts those that occur."""
    promised = 0
    for group in (metadata.row_group(k) for k in range(metadata.num_row_groups)):
        for column in (group.column(k) for k in range(group.num_columns)):
            width = VALUE_BYTES.get(column.physical_type)
            promised += column.num_values * (TEXT_BYTES if width is None else width)
            promised += column.total_uncompressed_size if width is None else 0
    return max(promised, metadata.num_rows)


def _text_bytes(column: pa.ChunkedArray) -> int:
    """The memory that a column takes when its indices are replaced by the texts they stand for."""
    total = 0
    for chunk in column.chunks:
        lengths = pc.call_function("binary_length", [chunk.dictionary])
        total += pc.call_function("sum", [lengths.take(chunk.indices)]).as_py() or 0
    return total


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_plain(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return pa.types.is_floating(kind.value_type)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return is_number or _is_text(kind) or pa.types.is_null(kind)
