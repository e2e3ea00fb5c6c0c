"""Splits of real images on disk: read-only files with checksums."""

import hashlib
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from proxyrob.errors import DataIntegrityError
from proxyrob.storage import Report, Stage
from proxyrob.storage.files import read_array, write_array
from proxyrob.types import as_images

SplitName = Literal["train", "validation", "test"]


class SourceReport(Report):
    """What real images there are. ``content_sha256`` identifies them, whatever made them.

    ``subset`` says which of the test images are there, where it is not all of them.
    """

    num_train: int
    num_validation: int
    num_test: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    content_sha256: str
    train_class_counts: tuple[int, ...]
    subset: str = "all"


@dataclass(frozen=True)
class Split:
    """The images of one split as stored, with their labels."""

    stored: UInt8[np.ndarray, "n h w c"]
    labels: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Split":
        """The first ``count`` images."""
        return Split(self.stored[:count], self.labels[:count])

    @property
    def images(self) -> Float[Tensor, "n c h w"]:
        """All images in [0,1]."""
        return as_images(self.stored)

    @property
    def targets(self) -> Int64[Tensor, " n"]:
        """All labels."""
        return torch.from_numpy(np.array(self.labels))


def write_splits(
    stage: Stage,
    splits: dict[SplitName, tuple[UInt8[np.ndarray, "n h w c"], Int64[np.ndarray, " n"]]],
    *,
    class_names: tuple[str, ...],
    started: float | None = None,
) -> SourceReport:
    """Write every split as two ``.npy`` files and finish the stage.

    Raises ``DataIntegrityError`` when a class has no training image or a label is outside the classes.
    """
    names = []
    content = hashlib.sha256()
    for split, (stored, labels) in splits.items():
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
            raise DataIntegrityError(
                f"the {split} split has labels from {labels.min()} to {labels.max()}, but there are {len(class_names)} classes"
            )
        for array in (stored, labels):
            content.update(np.ascontiguousarray(array).data)  # without a copy of what is mapped from disk
        for part, array in (("images", stored), ("labels", labels)):
            names.append(f"{split}-{part}.npy")
            write_array(stage.folder / names[-1], array)
            (stage.folder / names[-1]).chmod(0o444)
    counts = np.bincount(splits["train"][1], minlength=len(class_names))
    if (missing := np.flatnonzero(counts == 0)).size:
        raise DataIntegrityError(
            f"the training split has no image of class {', '.join(class_names[k] for k in missing)}; "
            "take more training images or another seed"
        )
    stored = splits["train"][0]
    height, width, channels = stored.shape[1:]
    report = SourceReport(
        num_train=len(stored),
        num_validation=len(splits["validation"][0]),
        num_test=len(splits["test"][0]),
        class_names=class_names,
        image_shape=(channels, height, width),
        content_sha256=content.hexdigest(),
        train_class_counts=tuple(int(count) for count in counts),
    )
    return stage.finish(report, names, time.monotonic() if started is None else started)


def source_report(source: Stage) -> SourceReport:
    """What a finished source holds.

    Raises ``DataIntegrityError`` when it is not finished.
    """
    report, record = source.finished(SourceReport), source.record()
    if report is None or record is None:
        raise DataIntegrityError(f"{source.folder} holds no finished source; {source.remedy}")
    sizes = {entry.name: entry.size_bytes for entry in record.files}
    counts = {"train": report.num_train, "validation": report.num_validation, "test": report.num_test}
    for split, count in counts.items():
        if f"{split}-labels.npy" in sizes and not 0 <= 8 * count <= sizes[f"{split}-labels.npy"]:
            raise DataIntegrityError(
                f"{source.record_path} says that there are {count} {split} images, more than their files hold; {source.remedy}"
            )
    return report


def read_split(source: Stage, split: SplitName) -> Split:
    """Read one split, its hashes checked.

    Raises ``DataIntegrityError`` when a file is missing or altered, or holds no such images and labels.
    """
    report = source_report(source)
    channels, height, width = report.image_shape
    stored = read_array(source.verified(f"{split}-images.npy"))
    labels = read_array(source.verified(f"{split}-labels.npy"))
    is_right = stored.dtype == np.uint8 and stored.shape == (len(labels), height, width, channels)
    if not is_right or labels.dtype != np.int64 or labels.shape != (len(stored),):
        raise DataIntegrityError(
            f"{source.folder} has {split} images of {stored.dtype} {stored.shape} with labels of {labels.dtype} "
            f"{labels.shape}, expected uint8 {(len(labels), height, width, channels)} and int64; {source.remedy}"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < len(report.class_names):
        raise DataIntegrityError(
            f"{source.folder} has {split} labels from {labels.min()} to {labels.max()}, but there are "
            f"{len(report.class_names)} classes; {source.remedy}"
        )
    return Split(stored, labels)
