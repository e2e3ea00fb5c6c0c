"""The validation split: cut from the training images by their content alone, so that it is the same for every seed."""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from proxyrob.config.source import FileSource
from proxyrob.errors import DataIntegrityError
from proxyrob.shares import share_out
from proxyrob.source.arrays import BLOCK_ROWS, check_labels
from proxyrob.source.formats import ImageFile
from proxyrob.source.splits import SourceReport, Split, write_splits
from proxyrob.storage import Stage
from proxyrob.types import OnProgress, no_progress


def write_cut(
    config: FileSource,
    train: Split,
    test: Split,
    *,
    class_names: tuple[str, ...],
    stage: Stage,
    started: float | None = None,
) -> SourceReport:
    """Cut the validation split from ``train``, write all three splits and finish the stage.

    Within each class the training images are ordered by a hash of their pixels: the first go to validation, the next to
    training, from every class in proportion to its size. So the cut depends on no seed and not on the order of the files.
    Training images keep their order; of the test images the first ``config.num_test`` are taken.

    Raises ``ValueError`` when there are fewer images than asked for.
    """
    num_train, num_validation, num_test = config.num_train, config.num_validation, config.num_test
    if num_test is not None and num_test > len(test):
        raise ValueError(f"expected source.num_test of at most {len(test)}, the number of test images, got {num_test}")
    available = len(train) - num_validation
    if available < max(1, num_train or 1):
        raise ValueError(
            f"expected source.num_validation + source.num_train of at most {len(train)}, the number of training images, got "
            f"{num_validation} + {num_train or 'at least 1'}"
        )
    kept, rest = _take(train, np.arange(len(train)), num_validation, len(class_names))
    if num_train is not None:
        rest, _ = _take(train, rest, num_train, len(class_names))
    chosen = {
        "train": _gathered(train, rest, stage.scratch / "train.npy"),
        "validation": _gathered(train, kept, stage.scratch / "validation.npy"),
    }
    test = test.first(len(test) if num_test is None else num_test)
    report = write_splits(
        stage,
        {
            "train": (chosen["train"].stored, chosen["train"].labels),
            "validation": (chosen["validation"].stored, chosen["validation"].labels),
            "test": (test.stored, test.labels),
        },
        class_names=class_names,
        started=started,
    )
    stage.clear()
    return report


def spool_images(
    stage: Stage,
    files: tuple[ImageFile, ImageFile],
    places: tuple[Path, Path],
    *,
    num_classes: int | None = None,
    on_progress: OnProgress = no_progress,
) -> tuple[Split, Split]:
    """Decode the training and the test images onto disk, below the stage's scratch folder, and map them into memory.

    Without ``num_classes`` the classes are the labels from 0 to the highest of a training image. ``places`` are how errors
    name the files.

    Raises ``DataIntegrityError`` when images have no labels, labels outside the classes or another shape, or do not decode.
    """
    for file, place in zip(files, places, strict=True):
        if not file.has_labels:
            raise DataIntegrityError(f"{place} has no labels; a source needs one for each image")
    shapes = ["×".join(map(str, file.image_shape)) for file in files]
    if shapes[0] != shapes[1]:
        raise DataIntegrityError(
            f"{places[0]} has images of {shapes[0]}, {places[1]} of {shapes[1]} (height×width×channels); all images "
            "of a source must have one size and as many channels"
        )
    splits, done, total = [], 0, sum(file.num_images for file in files)
    for name, file, place in zip(("train", "test"), files, places, strict=True):
        stored = np.lib.format.open_memmap(
            stage.scratch / f"all-{name}.npy", mode="w+", dtype=np.uint8, shape=(file.num_images, *file.image_shape)
        )
        labels = np.empty(file.num_images, np.int64)
        first = 0
        for images, block in file.read():
            assert block is not None
            rows = slice(first, first + len(images))
            stored[rows] = images
            # more classes than training images cannot be: every class needs one
            labels[rows] = check_labels(block, str(place), first, num_classes or file.num_images)
            first += len(images)
            on_progress(done + first, total)
        splits.append(Split(stored, labels))
        num_classes = num_classes or int(labels.max()) + 1
        done += file.num_images
    return splits[0], splits[1]


def _take(
    split: Split, rows: Int64[np.ndarray, " m"], count: int, num_classes: int
) -> tuple[Int64[np.ndarray, " count"], Int64[np.ndarray, " left"]]:
    """``count`` of the given rows and those that are left, both in ascending order."""
    of_class = [rows[split.labels[rows] == k] for k in range(num_classes)]
    quotas = share_out(count, np.array([len(members) for members in of_class]))
    taken = np.sort(np.concatenate([_by_hash(split, members)[:quota] for members, quota in zip(of_class, quotas, strict=True)]))
    return taken, np.setdiff1d(rows, taken, assume_unique=True)


def _by_hash(split: Split, rows: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
    hashes = [hashlib.blake2b(split.stored[row].tobytes(), digest_size=8).digest() for row in rows]
    return rows[np.argsort(np.array([int.from_bytes(found) for found in hashes], np.uint64), kind="stable")]


def _gathered(split: Split, rows: Int64[np.ndarray, " m"], path: Path) -> Split:
    """Some rows of a split, gathered on disk rather than in memory."""
    stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(rows), *split.stored.shape[1:]))
    for first in range(0, len(rows), BLOCK_ROWS):
        stored[first : first + BLOCK_ROWS] = split.stored[rows[first : first + BLOCK_ROWS]]
    return Split(stored, split.labels[rows])
