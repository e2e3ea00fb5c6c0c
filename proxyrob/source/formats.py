"""Images in files of any layout that is met in the field, behind one protocol that streams them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from proxyrob.source.arrays import Rows, open_arrays
from proxyrob.source.encoded import open_folder, open_parquet

__all__ = ["ImageFile", "Rows", "open_images"]

LAYOUTS = (
    ".bin (uint8 images one after another), .npy, .npz (arrays image and label), .parquet (the hub's layout), a folder of "
    "parquet files, a folder of images or of one folder of images for each class"
)


class ImageFile(Protocol):
    """Images of one size in a file or a folder, of which no more than a block is in memory at any time.

    What a header can say has been checked when the file was opened; what only the content can say is checked while it is
    read. Rows are counted from 0.
    """

    @property
    def num_images(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels (1 or 3)."""
        ...

    @property
    def has_labels(self) -> bool: ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes in the order of their labels, where the file names them."""
        ...

    def read(self, start: int = 0) -> Iterator[Rows]:
        """Images (uint8, n h w c) and labels (int64, or ``None`` without labels) in blocks, from row ``start`` on.

        The content of a row does not depend on ``start``. Raises ``DataIntegrityError`` naming the file and the row when an
        image cannot be decoded, has another size, or has a label outside the classes, and ``ValueError`` when there is no
        such row to start from.
        """
        ...


def open_images(path: Path, *, labels: Path | None = None, image_shape: tuple[int, int, int] | None = None) -> ImageFile:
    """Open the images at ``path``, whose layout is known by its suffix, or by its first bytes where the suffix says nothing.

    ``labels`` is an ``.npy`` file of integers for images that have none of their own. ``image_shape`` (height, width,
    channels) is what the images have to have; for ``.bin`` it is how they are cut, 32×32×3 when not given. In parquet and
    image folders every image is decoded to as many channels as ``image_shape`` has, and without it to those of the first
    image. ``path`` may end in a pattern of parquet files (``data/train-*.parquet``).

    Raises ``FileNotFoundError`` when there is nothing at ``path``, and ``DataIntegrityError`` with the file, the row and the
    remedy when a size, a shape, a type or a count does not fit, or when the file holds pickled objects.
    """
    if path.is_dir():
        opened = open_parquet if any(path.glob("*.parquet")) else open_folder
        return opened(path, labels=labels, image_shape=image_shape)
    if "*" in path.name:
        return open_parquet(path, labels=labels, image_shape=image_shape)
    if not path.is_file():
        raise FileNotFoundError(f"there is nothing at {path}; give a file or folder of images: {LAYOUTS}")
    match path.suffix.lower(), _first_bytes(path):
        case ".bin", _:
            return open_arrays(path, "bin", labels=labels, image_shape=image_shape)
        case (".npy", _) | (_, b"\x93NUM"):
            return open_arrays(path, "npy", labels=labels, image_shape=image_shape)
        case (".npz", _) | (_, b"PK\x03\x04"):
            return open_arrays(path, "npz", labels=labels, image_shape=image_shape)
        case (".parquet", _) | (_, b"PAR1"):
            return open_parquet(path, labels=labels, image_shape=image_shape)
    raise ValueError(f"{path} is none of the known layouts: {LAYOUTS}")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)
