"""Adversarial images in files: stored to the last bit, and believed only after they were read again."""

import io
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from proxyrob.attacks import Attacked
from proxyrob.device import eval_mode
from proxyrob.errors import DataIntegrityError
from proxyrob.memory import at_most
from proxyrob.storage import Report
from proxyrob.storage.bounded import open_table, read_table
from proxyrob.storage.files import HEADER, read_header, written_whole
from proxyrob.threat import Threat

ADVERSARIAL = "adversarial.parquet"
PIXELS = "pixels"
COLUMNS = ("index", "label", "attack", PIXELS)
REMEDY = "attack again"
ENCODING: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": False,
    "use_byte_stream_split": [f"{PIXELS}.list.element"],
}
"""Pixels are kept as float32, bit for bit, the bytes of one significance together."""

TOLERANCE = 1e-5
"""By how much float32 arithmetic may carry a perturbation beyond epsilon."""


class AdversarialHeader(Report):
    """Of which model and which images, and within which threat model."""

    norm: str
    epsilon: str
    split: str
    image_shape: tuple[int, int, int]
    model: str
    data_sha256: str


@dataclass(frozen=True)
class AdversarialImages:
    """Adversarial images of one attack, their rows in the split and the labels that they are not classified as."""

    attack: str
    indices: Int64[np.ndarray, " m"]
    labels: Int64[np.ndarray, " m"]
    images: Float[Tensor, "m c h w"]

    def __len__(self) -> int:
        return len(self.indices)


@torch.inference_mode()
def predict_classes(
    model: nn.Module, images: Float[Tensor, "n c h w"], *, batch_size: int, device: torch.device | str
) -> Int64[Tensor, " n"]:
    """The classes a model gives in eval mode, on the CPU."""
    if not len(images):
        return torch.zeros(0, dtype=torch.int64)
    with eval_mode(model):
        return torch.cat([model(batch.to(device)).argmax(1).cpu() for batch in images.split(at_most(batch_size))])


def tabulate_unit(
    model: nn.Module,
    rows: Int64[np.ndarray, " m"],
    images: Float[Tensor, "m c h w"],
    labels: Int64[Tensor, " m"],
    attacked: Attacked,
    threat: Threat,
    attack: str,
) -> pa.Table:
    """What an attack made of the images ``rows``: columns ``index, broken, pixels``, null where an image was not broken.

    What the attack found is written and read again, measured again (norm, range, NaN) and shown to ``model`` again: an image
    counts as broken only if the stored one is misclassified. Raises ``DataIntegrityError`` when one is outside the threat
    model.
    """
    claimed = attacked.broken.cpu().numpy()
    stored = _written_and_read(attacked.images[attacked.broken].cpu())
    check_inside(stored, images[torch.from_numpy(claimed)], threat, attack)
    device = attacked.images.device
    found = predict_classes(model, stored, batch_size=max(len(stored), 1), device=device).numpy()
    confirmed = found != labels.numpy()[claimed]
    broken = np.zeros(len(rows), dtype=bool)
    broken[claimed] = confirmed
    pixels = as_column(stored[torch.from_numpy(confirmed)], broken)
    return pa.table({"index": rows, "broken": broken, PIXELS: pixels})


def read_unit(unit: pa.Table, attack: str, labels: Int64[np.ndarray, " n"], image_shape: tuple[int, ...]) -> AdversarialImages:
    """The adversarial images of a unit; ``labels`` are those of the whole split.

    Raises ``DataIntegrityError`` when it has not one for each row that was broken.
    """
    indices = unit["index"].to_numpy()[unit["broken"].to_numpy()]
    images = as_tensor(unit[PIXELS], image_shape)
    if len(images) != len(indices):
        raise DataIntegrityError(
            f"a unit of {attack} has {len(images)} adversarial images for {len(indices)} broken ones; delete the units and run "
            "again"
        )
    return AdversarialImages(attack, indices, labels[indices], images)


def _written_and_read(images: Float[Tensor, "m c h w"]) -> Float[Tensor, "m c h w"]:
    file = io.BytesIO()
    pq.write_table(pa.table({PIXELS: as_column(images, np.ones(len(images), dtype=bool))}), file, **ENCODING)
    return as_tensor(pq.read_table(io.BytesIO(file.getvalue()))[PIXELS], tuple(images.shape[1:]))


def as_column(images: Float[Tensor, "m c h w"], rows: Bool[np.ndarray, " n"]) -> pa.Array:
    """A column with the images in the ``m`` rows that are true, in order, and null in the others."""
    offsets = np.concatenate([[0], np.cumsum(rows)]) * int(np.prod(images.shape[1:]))
    starts = pa.array(offsets.astype(np.int32), mask=np.concatenate([~rows, [False]]))
    return pa.ListArray.from_arrays(starts, pa.array(images.numpy().reshape(-1)))


def as_tensor(column: pa.ChunkedArray, image_shape: tuple[int, ...]) -> Float[Tensor, "m c h w"]:
    """The images of a column, without its nulls.

    Raises ``DataIntegrityError`` when they have another shape.
    """
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if min(image_shape) < 1 or len(values) % math.prod(image_shape):
        raise DataIntegrityError(f"{len(values)} pixels are not those of images of shape {image_shape}; attack again")
    return torch.from_numpy(np.array(values, dtype=np.float32)).view(-1, *image_shape)


def check_inside(attacked: Float[Tensor, "m c h w"], images: Float[Tensor, "m c h w"], threat: Threat, attack: str) -> None:
    """Raise ``DataIntegrityError`` unless every attacked image is inside [0,1] and the threat model."""
    if not len(attacked):
        return
    delta = (attacked - images).flatten(1)
    length = delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)
    if not bool(torch.isfinite(attacked).all()) or attacked.min() < 0 or attacked.max() > 1:
        raise DataIntegrityError(f"{attack} left [0,1] or produced NaN: the model's outputs or gradients are not finite")
    if float(length.max()) > float(threat.epsilon) + TOLERANCE:
        raise DataIntegrityError(f"{attack} left the threat model {threat}: a perturbation has norm {float(length.max()):.6f}")


def write_adversarial(path: Path, parts: Iterable[AdversarialImages], header: AdversarialHeader) -> None:
    """Write adversarial images part by part, so that one part at a time is in memory.

    Columns ``index, label, attack, pixels`` (float32 in [0,1], channels first).
    """
    kinds = (pa.int64(), pa.int64(), pa.string(), pa.list_(pa.float32()))
    schema = pa.schema(
        dict(zip(COLUMNS, kinds, strict=True)),
        metadata={HEADER: json.dumps(header.model_dump(mode="json"), sort_keys=True)},
    )
    with written_whole(path) as temporary, pq.ParquetWriter(temporary, schema, **ENCODING) as writer:
        for part in parts:
            if len(part):
                column = as_column(part.images, np.ones(len(part), dtype=bool))
                rows = {"index": part.indices, "label": part.labels, "attack": [part.attack] * len(part), PIXELS: column}
                writer.write_table(pa.table(rows, schema=schema))


def read_adversarial(path: Path) -> Iterator[AdversarialImages]:
    """The adversarial images of a file, part by part.

    Raises ``DataIntegrityError`` when it cannot be read or has not one image in each row.
    """
    where, image_shape = str(path), read_adversarial_header(path).image_shape
    with open_table(path, where, REMEDY) as file:
        num_parts = file.num_row_groups
    for number in range(num_parts):
        table = read_table(path, where, REMEDY, COLUMNS, number)
        images = as_tensor(table[PIXELS], image_shape)
        if len(images) != len(table) or not len(table):
            raise DataIntegrityError(f"{path} has {len(images)} images in {len(table)} rows; {REMEDY}")
        yield AdversarialImages(
            attack=table["attack"][0].as_py(),
            indices=table["index"].to_numpy().copy(),
            labels=table["label"].to_numpy().copy(),
            images=images,
        )


def read_adversarial_header(path: Path) -> AdversarialHeader:
    """The conditions that a file of adversarial images was made under."""
    return read_header(path, AdversarialHeader, REMEDY)
