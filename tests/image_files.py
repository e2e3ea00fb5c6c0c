"""Small files of images, as users have them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from proxyrob.source import Split

CLASSES = ("cat", "dog", "fox")


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
