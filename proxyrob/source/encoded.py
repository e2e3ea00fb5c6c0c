"""Images that lie in files encoded (PNG, JPEG, …): folders of images, and parquet in the hub's layout."""

import io
import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8
from PIL import Image

from proxyrob.errors import DataIntegrityError
from proxyrob.source.arrays import (
    BLOCK_BYTES,
    BLOCK_ROWS,
    Rows,
    StoredArray,
    check_start,
    label_blocks,
    open_labels,
    rows_per_block,
)
from proxyrob.source.walk import walk_files
from proxyrob.storage.bounded import (
    FREE_BYTES,
    explain_parquet,
    open_table,
    parse_json,
    require_image_size,
    require_plausible,
)

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow knows more, and starts other programs for some of them: Ghostscript for a file that begins as PostScript does."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of images in folders: those that torchvision's ``ImageFolder`` takes."""

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")
REMEDY = "it is cut off or damaged: copy or download it again"

UNDECODABLE = (
    OSError,
    SyntaxError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What a damaged image, or one that was made to do harm, makes Pillow raise."""

GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class EncodedRow:
    """One image as it lies in its file; ``where`` is how errors name it."""

    content: bytes | Path
    label: int | None
    where: str


@dataclass(frozen=True)
class EncodedImages:
    """Images that are decoded one by one, as ``ImageFile`` has them.

    ``encoded(start)`` gives the rows from ``start`` on. With ``is_converted`` every image is brought to the channels of
    ``image_shape``; without, the first image decided how many those are, and a colour image among grey ones is an error.
    """

    name: str
    num_images: int
    image_shape: tuple[int, int, int]
    has_own_labels: bool
    class_names: tuple[str, ...] | None
    labels: StoredArray | None
    encoded: Callable[[int], Iterator[EncodedRow]]
    is_converted: bool

    @property
    def has_labels(self) -> bool:
        return self.has_own_labels or self.labels is not None

    def read(self, start: int = 0) -> Iterator[Rows]:
        check_start(start, self.num_images, self.name)
        height, width, channels = self.image_shape
        rows = rows_per_block(self.image_shape)
        num_classes = None if self.class_names is None else len(self.class_names)
        given = label_blocks(self.labels, start, rows, self.num_images, num_classes)
        encoded = self.encoded(start)
        for first in range(start, self.num_images, rows):
            count = min(rows, self.num_images - first)
            images = np.empty((count, *self.image_shape), np.uint8)
            own = np.zeros(count, np.int64)
            for k, row in enumerate(islice(encoded, count)):
                images[k] = decode_image(
                    row.content, row.where, size=(height, width), channels=channels, is_converted=self.is_converted
                )
                if self.has_own_labels:
                    own[k] = _checked_label(row, num_classes)
            labels = next(given)
            yield images, own if self.has_own_labels else labels


def open_folder(
    path: Path,
    *,
    labels: Path | None = None,
    image_shape: tuple[int, int, int] | None = None,
    channels: Literal[1, 3] | None = None,
) -> EncodedImages:
    """The images in a folder: one folder below it for each class, or all in the folder itself.

    Classes are the folders in the order of their names, and images follow class by class in the order of their names, as
    in torchvision's ``ImageFolder``; hidden files and files that are no images are left out.
    """
    classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    loose = sorted(entry.name for entry in os.scandir(path) if entry.is_file() and _is_image(entry.name))
    files, own = [path / name for name in loose], None
    if classes:
        found = [_images_below(path / name) for name in classes]
        if loose:
            raise DataIntegrityError(
                f"{path} has folders ({classes[0]}, …) and images ({loose[0]}, …) beside each other; give a folder with one "
                "folder for each class, or one with images alone"
            )
        if empty := [name for name, below in zip(classes, found, strict=True) if not below]:
            raise DataIntegrityError(f"{path / empty[0]} holds no image ({', '.join(SUFFIXES)}); fill or remove that class")
        files = [file for below in found for file in below]
        own = np.repeat(np.arange(len(classes)), [len(below) for below in found])
    if not files:
        raise DataIntegrityError(f"{path} holds no image ({', '.join(SUFFIXES)}) and no .parquet file; give another folder")
    if own is not None and labels is not None:
        raise ValueError(f"{path} has a folder for each class, which labels its images; give it without {labels}")

    def encoded(start: int) -> Iterator[EncodedRow]:
        for row in range(start, len(files)):
            yield EncodedRow(files[row], None if own is None else int(own[row]), f"{files[row]} (row {row} of {path})")

    return _encoded_images(
        str(path), len(files), encoded, labels, image_shape, channels, tuple(classes) or None, own is not None
    )


def open_parquet(
    path: Path,
    *,
    labels: Path | None = None,
    image_shape: tuple[int, int, int] | None = None,
    channels: Literal[1, 3] | None = None,
) -> EncodedImages:
    """The images of a parquet file, of all parquet files of a folder, or of those whose names fit a pattern.

    The layout is the hub's: images in a column ``img`` or ``image`` (a struct with ``bytes``, or the bytes themselves),
    labels in an integer column ``label`` or ``fine_label``, the names of the classes in the schema's metadata. Files
    follow in the order of their names.
    """
    tables = [_ParquetTable.at(file) for file in parquet_files(path)]
    first = tables[0]
    for table in tables:
        if (table.image_column, table.label_column, table.class_names) != (
            first.image_column,
            first.label_column,
            first.class_names,
        ):
            raise DataIntegrityError(
                f"{table.path} has other columns or classes than {first.path}; give files of one data set and one split"
            )
    num_images = sum(table.num_rows for table in tables)
    size_bytes = sum(table.path.stat().st_size for table in tables)
    if num_images == 0:
        raise DataIntegrityError(f"{path} holds no rows; give another file")
    if first.label_column is not None and labels is not None:
        raise ValueError(f"{path} has labels of its own (column {first.label_column}); give it without {labels}")

    def encoded(start: int) -> Iterator[EncodedRow]:
        for table in tables:
            yield from table.rows(min(start, table.num_rows))
            start = max(0, start - table.num_rows)

    images = _encoded_images(
        str(path), num_images, encoded, labels, image_shape, channels, first.class_names, first.label_column is not None
    )
    require_plausible(str(path), num_images * math.prod(images.image_shape), size_bytes)
    return images


def parquet_files(path: Path) -> tuple[Path, ...]:
    """The parquet files that a path stands for: a file, a folder, or a pattern such as ``data/train-*.parquet``.

    Raises ``FileNotFoundError`` when there is none and ``ValueError`` when a folder holds several splits.
    """
    if path.is_file():
        return (path,)
    folder, pattern = (path, "*.parquet") if path.is_dir() else (path.parent, path.name)
    found = tuple(sorted(file for file in folder.glob(pattern) if file.is_file()))
    if not found:
        raise FileNotFoundError(f"there is no parquet file at {path}; give a file, a folder, or a pattern")
    splits = {match.group() for file in found if (match := re.match("train|val|dev|test", file.name))}
    if len(splits) > 1:
        raise ValueError(
            f"{path} holds several splits ({', '.join(file.name for file in found)}); give one, such as "
            f"{folder / found[0].name} or {folder}/train-*.parquet"
        )
    return found


def decode_image(
    content: bytes | Path,
    where: str,
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    is_converted: bool = True,
) -> UInt8[np.ndarray, "h w c"]:
    """One image as uint8 with one channel (grey) or three (RGB).

    Grey images with 16 bits keep the upper eight; transparency is dropped, as torchvision's loader does; palettes and all
    other modes become RGB. A grey image becomes RGB where three channels are expected; a colour image becomes grey only if
    ``is_converted``. Rotation in EXIF data is not applied.

    Raises ``DataIntegrityError`` when it cannot be decoded, is larger than any network takes or has another ``size`` (height,
    width) than the others.
    """
    with _decoding(where):
        image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS)
    with image:
        found = (image.height, image.width)
        require_image_size(where, *found)
        if size is not None and found != size:
            raise DataIntegrityError(
                f"{where} has {found[0]}×{found[1]} pixels, expected {size[0]}×{size[1]} (height×width); all images must have "
                "one size: resize or remove it"
            )
        is_grey = image.mode in GREY_MODES
        channels = channels or (1 if is_grey else 3)
        if channels == 1 and not is_grey and not is_converted:
            raise DataIntegrityError(
                f"{where} is a colour image, but the first one is grey; say how many channels all images are to have: 3 or 1 "
                "(source.channels, or the last number of an image shape)"
            )
        with _decoding(where):
            pixels = _pixels(image, channels, where)
    return pixels[..., None] if channels == 1 else pixels


def _pixels(image: Image.Image, channels: int, where: str) -> np.ndarray:
    if image.mode == "F":
        raise DataIntegrityError(f"{where} has floating-point levels, expected integers; save it with 8 bits")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 0xFFFF:
            raise DataIntegrityError(f"{where} has levels outside 0 to 65535; save it with 8 or 16 bits")
        image = Image.fromarray((levels >> 8).astype(np.uint8))
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # Pillow warns of transparency in a palette that becomes RGB at once
    return np.asarray(image.convert("L" if channels == 1 else "RGB"))


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    """What a damaged image makes Pillow raise, as an error that names it."""
    try:
        yield
    except DataIntegrityError:
        raise
    except UNDECODABLE as error:
        raise DataIntegrityError(f"{where} cannot be decoded ({error}); replace or remove it") from error


def _encoded_images(
    name: str,
    num_images: int,
    encoded: Callable[[int], Iterator[EncodedRow]],
    labels: Path | None,
    image_shape: tuple[int, int, int] | None,
    channels: Literal[1, 3] | None,
    class_names: tuple[str, ...] | None,
    has_own_labels: bool,
) -> EncodedImages:
    size, wanted = (None, channels) if image_shape is None else (image_shape[:2], image_shape[2])
    if wanted not in (None, 1, 3):
        raise ValueError(f"expected an image shape (height, width, channels) with 1 or 3 channels, got {image_shape}")
    first = next(encoded(0))
    height, width, found = decode_image(first.content, first.where, size=size, channels=wanted).shape
    return EncodedImages(
        name=name,
        num_images=num_images,
        image_shape=(height, width, found),
        has_own_labels=has_own_labels,
        class_names=class_names,
        labels=open_labels(labels, num_images, name),
        encoded=encoded,
        is_converted=wanted is not None,
    )


def _checked_label(row: EncodedRow, num_classes: int | None) -> int:
    if row.label is None or row.label < 0 or (num_classes is not None and row.label >= num_classes):
        expected = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
        raise DataIntegrityError(f"{row.where} has label {row.label}, expected {expected}; leave such rows out or correct them")
    return row.label


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _images_below(folder: Path) -> list[Path]:
    return [path for path in walk_files(folder) if _is_image(path.name)]


@dataclass(frozen=True)
class _ParquetTable:
    """One parquet file, its schema checked."""

    path: Path
    num_rows: int
    image_column: str
    label_column: str | None
    class_names: tuple[str, ...] | None
    is_struct: bool
    batch_rows: int

    @classmethod
    def at(cls, path: Path) -> "_ParquetTable":
        with open_table(path, str(path), REMEDY) as file:
            schema, metadata = file.schema_arrow, file.metadata
        image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
        kind = None if image is None else schema.field(image).type
        is_struct = kind is not None and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if image is None or not (is_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise DataIntegrityError(
                f"{path} has the columns {', '.join(f'{field.name} ({field.type})' for field in schema)}; expected images in a "
                f"column {' or '.join(IMAGE_COLUMNS)} (a struct with bytes, or binary)"
            )
        label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
        if label is not None and not pa.types.is_integer(schema.field(label).type):
            raise DataIntegrityError(f"{path}: column {label} is {schema.field(label).type}, expected integers")
        groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
        row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
        # what is written once may be in every row: as many rows at once as such would be in memory
        group_bytes = max((group.total_byte_size for group in groups), default=0)
        return cls(
            path=path,
            num_rows=metadata.num_rows,
            image_column=image,
            label_column=label,
            class_names=_class_names(path, schema.metadata or {}, label),
            is_struct=is_struct,
            batch_rows=min(BLOCK_ROWS, max(1, BLOCK_BYTES // max(row_bytes, 1)), max(1, FREE_BYTES // max(group_bytes, 1))),
        )

    def rows(self, start: int) -> Iterator[EncodedRow]:
        """The rows from ``start`` on; row groups before it are not read."""
        if start == self.num_rows:
            return
        # a buffered stream reads page by page, so that a file with one row group takes no more memory than one with many
        with explain_parquet(str(self.path), REMEDY), pq.ParquetFile(self.path, buffer_size=1 << 20) as file:
            first, groups = 0, list(range(file.num_row_groups))
            while first + file.metadata.row_group(groups[0]).num_rows <= start:
                first += file.metadata.row_group(groups.pop(0)).num_rows
            columns = [f"{self.image_column}.bytes" if self.is_struct else self.image_column]
            columns += [self.label_column] if self.label_column else []
            for batch in file.iter_batches(self.batch_rows, row_groups=groups, columns=columns, use_threads=False):
                skipped = min(max(0, start - first), len(batch))
                yield from self._rows_of(batch.slice(skipped), first + skipped)
                first += len(batch)

    def _rows_of(self, batch: Any, first: int) -> Iterator[EncodedRow]:
        images = batch.column(self.image_column)
        labels = batch.column(self.label_column) if self.label_column else [None] * len(batch)
        for row, (image, label) in enumerate(zip(images, labels, strict=True), first):
            where = f"{self.path}: row {row}"
            content = image.as_py()
            if self.is_struct and content is not None:
                content = content["bytes"]
            if content is None:
                raise DataIntegrityError(f"{where} has no bytes of an image; embed the images in the file")
            yield EncodedRow(content, None if label is None else label.as_py(), where)


def _class_names(path: Path, metadata: dict[bytes, bytes], label_column: str | None) -> tuple[str, ...] | None:
    """The names that the hub's libraries keep in the schema."""
    if label_column is None or b"huggingface" not in metadata:
        return None
    found = parse_json(metadata[b"huggingface"], f"{path}: the metadata of the hub", REMEDY)
    for key in ("info", "features", label_column, "names"):
        found = found.get(key) if isinstance(found, dict) else None
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise DataIntegrityError(f"{path}: the metadata of the hub does not name classes by texts; {REMEDY}")
    return tuple(found)
