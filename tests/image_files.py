"""Small files of images, as users have them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from proxyrob.source import ImageFile, Split, open_images
from tests.toys import tiny_split

CLASSES = ("cat", "dog", "fox")
SHAPE = (4, 5, 3)
CIFAR = Path(__file__).parents[1].parent / "shared" / "data" / "cifar10"
needs_cifar = pytest.mark.skipif(not CIFAR.is_dir(), reason=f"needs CIFAR-10 in the hub's layout at {CIFAR}")


def sorted_split() -> Split:
    """Eleven random images in the order of their classes, as a folder has them."""
    split = tiny_split(11, classes=3, shape=SHAPE)
    return Split(split.stored, np.sort(split.labels))


def png(pixels: np.ndarray) -> bytes:
    """An image (h, w, c) as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, split: Split, names: tuple[str, ...] | None = CLASSES, **options: Any) -> Path:
    """A parquet file in the hub's layout, with the metadata that the hub's libraries write."""
    images = pa.array([{"bytes": png(image), "path": "a.png"} for image in split.stored])
    table = pa.table({"img": images, "label": pa.array(split.labels)})
    if names is not None:
        features = {"img": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def write_folder(path: Path, split: Split, names: tuple[str, ...] | None = CLASSES) -> Path:
    """A folder of images, with one folder for each class unless there are no ``names``."""
    for row, (image, label) in enumerate(zip(split.stored, split.labels, strict=True)):
        folder = path if names is None else path / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row:04d}.png").write_bytes(png(image))
    return path


# The same images in every layout that can be read


def as_bin(folder: Path, split: Split) -> ImageFile:
    """Raw pixels, their labels beside them."""
    np.save(folder / "labels.npy", split.labels)
    (folder / "images.bin").write_bytes(split.stored.tobytes())
    return open_images(folder / "images.bin", labels=folder / "labels.npy", image_shape=SHAPE)


def as_npy(folder: Path, split: Split) -> ImageFile:
    """A plain array, its labels beside it, of another type."""
    np.save(folder / "labels.npy", split.labels.astype(">i4"))
    np.save(folder / "images.npy", split.stored)
    return open_images(folder / "images.npy", labels=folder / "labels.npy")


def as_npz(folder: Path, split: Split) -> ImageFile:
    """Arrays in a zip file."""
    np.savez(folder / "a.npz", image=split.stored, label=split.labels)
    return open_images(folder / "a.npz")


def as_npz_deflated(folder: Path, split: Split) -> ImageFile:
    """Arrays in a compressed zip file, under other names and with one that means nothing."""
    np.savez_compressed(folder / "a.npz", labels=split.labels.astype(np.uint8), images=split.stored, other=np.ones(3))
    return open_images(folder / "a.npz")


def as_parquet(folder: Path, split: Split) -> ImageFile:
    """One table in several row groups."""
    return open_images(write_parquet(folder / "a.parquet", split, row_group_size=3))


def as_parquet_folder(folder: Path, split: Split) -> ImageFile:
    """A table in two files."""
    write_parquet(folder / "train-00000-of-00002.parquet", split.first(4), row_group_size=3)
    write_parquet(folder / "train-00001-of-00002.parquet", Split(split.stored[4:], split.labels[4:]))
    return open_images(folder)


def as_class_folders(folder: Path, split: Split) -> ImageFile:
    """One folder for each class, and what else may lie there."""
    write_folder(folder / "images", split)
    (folder / "images" / "notes.txt").write_text("no image")
    (folder / "images" / ".hidden").mkdir()
    return open_images(folder / "images")


def as_flat_folder(folder: Path, split: Split) -> ImageFile:
    """All images in one folder, their labels beside it."""
    np.save(folder / "labels.npy", split.labels)
    return open_images(write_folder(folder / "images", split, None), labels=folder / "labels.npy")


LAYOUTS = [as_bin, as_npy, as_npz, as_npz_deflated, as_parquet, as_parquet_folder, as_class_folders, as_flat_folder]
every_layout = pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__.removeprefix("as_"))
Write = Callable[[Path, Split], ImageFile]


def read_all(file: ImageFile, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels from a row on."""
    blocks = list(file.read(start))
    labels = [block[1] for block in blocks if block[1] is not None]
    return np.concatenate([block[0] for block in blocks]), np.concatenate(labels)
