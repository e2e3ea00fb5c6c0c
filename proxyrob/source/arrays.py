"""Images and labels that lie in files as plain arrays (``.bin``, ``.npy``, ``.npz``): read in blocks, never unpickled."""

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
from jaxtyping import Int64, UInt8

from proxyrob.errors import DataIntegrityError
from proxyrob.storage.bounded import read_npy_header, require_image_size, require_plausible

Rows = tuple[UInt8[np.ndarray, "n h w c"], Int64[np.ndarray, " n"] | None]
"""A block of images and, where the file has any, their labels."""

BLOCK_BYTES = 4 << 20
BLOCK_ROWS = 4096

IMAGE_NAMES = ("image", "images")
LABEL_NAMES = ("label", "labels")


@dataclass(frozen=True)
class StoredArray:
    """An array in a file, or in a member of a zip file: its header is read and its size checked, its content is not read."""

    path: Path
    member: str | None
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def name(self) -> str:
        """How errors name it."""
        return str(self.path) if self.member is None else f"{self.path}: {self.member}"

    def blocks(self, start: int, rows: int) -> Iterator[np.ndarray]:
        """The rows from ``start`` on, ``rows`` at a time.

        Raises ``DataIntegrityError`` when the content is damaged. (A damaged member of a zip file that is read from its
        beginning is found with its last row.)
        """
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        with _opened(self.path, self.member) as file:
            with _explained(self.name):
                if start:
                    file.seek(self.offset + start * row_bytes)
                else:
                    file.read(self.offset)  # not a seek, after which zipfile no longer compares the checksum
            for first in range(start, self.shape[0], rows):
                content = bytearray(min(rows, self.shape[0] - first) * row_bytes)
                with _explained(self.name):
                    found = file.readinto(content)
                if found != len(content):
                    raise DataIntegrityError(
                        f"{self.name} ends after row {first + found // row_bytes} of {self.shape[0]}; was it replaced while it "
                        "was read? Copy it again"
                    )
                yield np.frombuffer(content, self.dtype).reshape(-1, *self.shape[1:])


@dataclass(frozen=True)
class ArrayImages:
    """Images and labels in plain arrays, as ``ImageFile`` has them."""

    images: StoredArray
    labels: StoredArray | None

    @property
    def num_images(self) -> int:
        return self.images.shape[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    @property
    def has_labels(self) -> bool:
        return self.labels is not None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return None

    def read(self, start: int = 0) -> Iterator[Rows]:
        check_start(start, self.num_images, self.images.name)
        rows = rows_per_block(self.image_shape)
        labels = label_blocks(self.labels, start, rows, self.num_images)
        for images in self.images.blocks(start, rows):
            yield images, next(labels)


def open_arrays(
    path: Path,
    layout: Literal["bin", "npy", "npz"],
    *,
    labels: Path | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> ArrayImages:
    """The images of an ``.npz`` or ``.npy`` file, or of a ``.bin``, which holds nothing but the bytes of its images.

    Raises ``DataIntegrityError`` when the arrays are not uint8 images of ``image_shape``, not as many as labels, not whole,
    or pickled.
    """
    given = None
    match layout:
        case "bin":
            images = _raw_array(path, image_shape or (32, 32, 3))
        case "npy":
            images = _array_of_npy(path)
        case "npz":
            members = _members_of_npz(path)
            images = _named(members, IMAGE_NAMES, path, "images")
            if members.keys() & set(LABEL_NAMES):
                given = _named(members, LABEL_NAMES, path, "labels")
    images = _as_images(images, image_shape)
    if given is not None and labels is not None:
        raise ValueError(f"{path} has labels of its own ({given.member}); give it without {labels}")
    return ArrayImages(images, _as_labels(given, images) if given else open_labels(labels, images.shape[0], images.name))


def open_labels(path: Path | None, num_images: int, images: str) -> StoredArray | None:
    """The labels in an ``.npy`` file, one integer for each of the ``num_images`` images in ``images``.

    Raises ``DataIntegrityError`` when they are not integers or not as many.
    """
    if path is None:
        return None
    require_file(path)
    array = _array_of_npy(path)
    return _as_labels(array, StoredArray(Path(images), None, 0, (num_images,), np.dtype(np.uint8)))


def label_blocks(
    labels: StoredArray | None, start: int, rows: int, num_images: int, num_classes: int | None = None
) -> Iterator[Int64[np.ndarray, " n"] | None]:
    """The labels that belong to blocks of images, checked; ``None`` for each block where there are none."""
    if labels is None:
        yield from (None for _ in range(start, num_images, rows))
        return
    for block, first in zip(labels.blocks(start, rows), range(start, num_images, rows), strict=True):
        yield check_labels(block, labels.name, first, num_classes)


def check_labels(labels: np.ndarray, name: str, first_row: int = 0, num_classes: int | None = None) -> Int64[np.ndarray, " n"]:
    """Integer labels as int64, none of them negative or outside the classes.

    Raises ``DataIntegrityError`` naming the file and the row of the first wrong one; ``first_row`` is the row of the
    first label.
    """
    limit = np.iinfo(np.int64).max if num_classes is None else num_classes
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if wrong.size:
        expected = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
        raise DataIntegrityError(
            f"{name}: row {first_row + int(wrong[0])} has label {int(labels[wrong[0]])}, expected {expected}; "
            "leave such rows out or correct them"
        )
    return labels.astype(np.int64)


def check_start(start: int, num_images: int, name: str) -> None:
    """Raise ``ValueError`` unless reading can begin at row ``start``."""
    if not 0 <= start <= num_images:
        raise ValueError(f"expected to start at a row from 0 to {num_images}, the number of images in {name}, got {start}")


def rows_per_block(image_shape: tuple[int, int, int]) -> int:
    """How many images are read at once, so that large images take no more memory than small ones."""
    return min(BLOCK_ROWS, max(1, BLOCK_BYTES // math.prod(image_shape)))


def require_file(path: Path) -> None:
    """Raise ``FileNotFoundError`` unless there is a file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of one")


def _raw_array(path: Path, image_shape: tuple[int, int, int]) -> StoredArray:
    size_bytes, image_bytes = path.stat().st_size, math.prod(image_shape)
    if min(image_shape) < 1:
        raise ValueError(f"expected an image shape of three positive numbers (height, width, channels), got {image_shape}")
    if size_bytes == 0 or size_bytes % image_bytes:
        shape = "×".join(map(str, image_shape))
        hint = "it is cut off, or its images have another shape: give it"
        if size_bytes and size_bytes % (image_bytes + 1) == 0:
            hint = "its size fits CIFAR's own layout (a label byte before every image, channels first), which is read through "
            hint += "torchvision (source.kind=cifar10)"
        raise DataIntegrityError(
            f"{path} has {size_bytes} bytes, expected a multiple of {image_bytes} (uint8 images of {shape}); after row "
            f"{size_bytes // image_bytes} there are {size_bytes % image_bytes} bytes left over; {hint}"
        )
    return StoredArray(path, None, 0, (size_bytes // image_bytes, *image_shape), np.dtype(np.uint8))


def _array_of_npy(path: Path) -> StoredArray:
    with path.open("rb") as file:
        return _read_header(file, path, None, path.stat().st_size)


def _members_of_npz(path: Path) -> dict[str, StoredArray]:
    found = {}
    with _explained(str(path)), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if name in IMAGE_NAMES + LABEL_NAMES:
                require_plausible(f"{path}: {entry.filename}", entry.file_size, entry.compress_size)
                with _open_member(archive, entry.filename) as file:
                    found[name] = _read_header(file, path, entry.filename, entry.file_size)
    return found


def _read_header(file: io.BufferedIOBase, path: Path, member: str | None, size_bytes: int) -> StoredArray:
    name = str(path) if member is None else f"{path}: {member}"
    shape, is_fortran, dtype, offset = read_npy_header(file, name, size_bytes)
    if is_fortran and len(shape) > 1:
        raise DataIntegrityError(
            f"{name} is stored in Fortran's order, column by column, and cannot be read image by image; save "
            "numpy.ascontiguousarray of it"
        )
    return StoredArray(path, member, offset, shape, dtype)


def _named(members: dict[str, StoredArray], names: tuple[str, ...], path: Path, what: str) -> StoredArray:
    found = [members[name] for name in names if name in members]
    if len(found) != 1:
        with zipfile.ZipFile(path) as archive:
            there = ", ".join(archive.namelist()) or "nothing"
        raise DataIntegrityError(
            f"{path}: expected exactly one array of {what} called {' or '.join(names)}, found {there}; save it again under "
            "that name"
        )
    return found[0]


def _as_images(array: StoredArray, image_shape: tuple[int, int, int] | None) -> StoredArray:
    if array.dtype != np.uint8:
        raise DataIntegrityError(
            f"{array.name} holds {array.dtype}, expected uint8 from 0 to 255; bring its values into that range and round them"
        )
    shape = (*array.shape, 1) if len(array.shape) == 3 else array.shape
    if len(shape) != 4 or shape[3] not in (1, 3) or not all(shape):
        hint = " (channels come last: numpy.transpose(images, (0, 2, 3, 1)))" if shape[1:2] in ((1,), (3,)) else ""
        raise DataIntegrityError(
            f"{array.name} has shape {array.shape}, expected (images, height, width, channels) with 1 or 3 channels{hint}"
        )
    require_image_size(f"each image of {array.name}", *shape[1:3])
    if image_shape is not None and shape[1:] != image_shape:
        raise DataIntegrityError(
            f"{array.name} holds images of {'×'.join(map(str, shape[1:]))}, expected {'×'.join(map(str, image_shape))} "
            "(height, width, channels); give the file or the shape that fits"
        )
    return StoredArray(array.path, array.member, array.offset, shape, array.dtype)


def _as_labels(array: StoredArray, images: StoredArray) -> StoredArray:
    if array.dtype.kind not in "iu" or len(array.shape) != 1:
        raise DataIntegrityError(
            f"{array.name} holds {array.dtype} of shape {array.shape}, expected one integer label for each image"
        )
    if array.shape[0] != images.shape[0]:
        raise DataIntegrityError(
            f"{array.name} has {array.shape[0]} labels, but {images.name} has {images.shape[0]} images; one of the two is cut "
            "off or belongs to another file"
        )
    return array


@contextmanager
def _opened(path: Path, member: str | None) -> Iterator[io.BufferedIOBase]:
    if member is None:
        with path.open("rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive, _open_member(archive, member) as file:
        yield file


def _open_member(archive: zipfile.ZipFile, member: str) -> io.BufferedIOBase:
    return cast(io.BufferedIOBase, archive.open(member))  # typed more widely than it is


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What a damaged zip file raises, as an error that says so."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataIntegrityError(
            f"{name} cannot be read as a zip file ({error}); it is cut off or damaged: copy or download it again"
        ) from error
