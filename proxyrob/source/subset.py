"""Test images alone: some or all of a source's, or of a file's, to measure a model on that was trained elsewhere."""

import hashlib
import time
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from proxyrob.config.source import Cifar2Source, Cifar100Source, CifarSource, FileSource
from proxyrob.errors import DataIntegrityError
from proxyrob.rng import Streams
from proxyrob.source.arrays import check_labels
from proxyrob.source.cifar import CIFAR2_NAMES, CIFAR10_NAMES, CIFAR100_NAMES, SHAPE, select_classes
from proxyrob.source.encoded import open_parquet
from proxyrob.source.fingerprint import fingerprint, locate_test
from proxyrob.source.formats import ImageFile
from proxyrob.source.given import open_given
from proxyrob.source.splits import SourceReport, Split, read_split, source_report
from proxyrob.storage import Report, Stage
from proxyrob.storage.files import read_array, write_array
from proxyrob.types import OnProgress, no_progress

ROWS = "test-rows.npy"


class ImageSubset(Report):
    """Which of the test images: all, the first ``count``, or ``count`` that ``seed`` draws.

    Of one seed a smaller subset is part of every larger one.
    """

    count: int | None = None
    seed: int | None = None

    def identify(self, total: int) -> str:
        """What tables say of it: ``all``, ``first-100`` or ``seed-3-100``."""
        if self.count is None or self.count == total:
            return "all"
        return f"first-{self.count}" if self.seed is None else f"seed-{self.seed}-{self.count}"

    def rows(self, total: int) -> Int64[np.ndarray, " n"]:
        """The rows out of ``total``, ascending.

        Randomness: ``source/subset``. Raises ``ValueError`` when there are not as many.
        """
        if self.count is None:
            return np.arange(total)
        if not 0 < self.count <= total:
            raise ValueError(f"expected 1 to {total} images, the number of test images, got {self.count}")
        if self.seed is None:
            return np.arange(self.count)
        return np.sort(Streams(self.seed).numpy("source/subset").permutation(total)[: self.count])


def take_test_images(
    subset: ImageSubset, *, source: Stage, stage: Stage, on_progress: OnProgress = no_progress
) -> SourceReport:
    """Test images of a finished source as a source of its own, whose other splits are empty.

    Raises ``ValueError`` when there are not as many.
    """
    if (report := stage.finished(SourceReport)) is not None:
        return report
    started, real, split = time.monotonic(), source_report(source), read_split(source, "test")
    rows = subset.rows(len(split))
    on_progress(1, 1)
    chosen = Split(split.stored[rows], split.labels[rows])
    return _write(stage, chosen, rows, real.class_names, subset.identify(len(split)), started)


def read_test_images(
    config: FileSource, subset: ImageSubset, *, sha256: str, stage: Stage, on_progress: OnProgress = no_progress
) -> SourceReport:
    """Read the test images of a source that lie in files; its training images need not be there.

    ``sha256`` is the fingerprint that the files have to have (``fingerprint_test``). What is not chosen is decoded, and
    forgotten. Raises ``DataIntegrityError`` when the files have changed or an image or a label does not fit, ``ValueError``
    when there are fewer images than asked for.
    """
    if (report := stage.finished(SourceReport)) is not None:
        return report
    started, place = time.monotonic(), locate_test(config)
    if (found := fingerprint(place)) != sha256:
        raise DataIntegrityError(f"{place} changed while it was being read: sha256 {found}, expected {sha256}; try again")
    if isinstance(config, CifarSource):
        names = CIFAR100_NAMES if isinstance(config, Cifar100Source) else CIFAR10_NAMES
        file: ImageFile = open_parquet(place, image_shape=SHAPE)
    else:
        file = open_given(config, place)
        names = config.class_names or file.class_names
    if not file.has_labels:
        raise DataIntegrityError(f"{place} has no labels; accuracies need one for each image")
    split = _read(file, place, None if names is None else len(names), on_progress)
    if isinstance(config, Cifar2Source):
        chosen = [CIFAR10_NAMES.index(name) for name in CIFAR2_NAMES]
        split, names = select_classes(split, chosen), CIFAR2_NAMES
    if names is None:
        names = tuple(str(label) for label in range(int(split.labels.max()) + 1))
    if config.num_test is not None:
        split = split.first(config.num_test)
    rows = subset.rows(len(split))
    return _write(stage, Split(split.stored[rows], split.labels[rows]), rows, names, subset.identify(len(split)), started)


def fingerprint_test(config: FileSource) -> str:
    """What identifies the content of a source's test files.

    Raises ``FileNotFoundError`` when there are none, ``ValueError`` when a folder holds those of several sets.
    """
    return fingerprint(locate_test(config))


def read_rows(source: Stage) -> Int64[np.ndarray, " n"]:
    """The rows that a source's test images have in the whole test split, ascending; counted, where it holds all of it."""
    record = source.record()
    if record is not None and ROWS in {entry.name for entry in record.files}:
        return read_array(source.verified(ROWS))
    return np.arange(source_report(source).num_test)


def _read(file: ImageFile, place: Path, num_classes: int | None, on_progress: OnProgress) -> Split:
    stored: UInt8[np.ndarray, "n h w c"] = np.empty((file.num_images, *file.image_shape), np.uint8)
    labels, first = np.empty(file.num_images, np.int64), 0
    for images, block in file.read():
        assert block is not None
        rows = slice(first, first + len(images))
        stored[rows], labels[rows] = images, check_labels(block, str(place), first, num_classes)
        first += len(images)
        on_progress(first, file.num_images)
    return Split(stored, labels)


def _write(
    stage: Stage, split: Split, rows: Int64[np.ndarray, " n"], class_names: tuple[str, ...], name: str, started: float
) -> SourceReport:
    content = hashlib.sha256()
    arrays = {"test-images.npy": np.ascontiguousarray(split.stored), "test-labels.npy": split.labels, ROWS: rows}
    for file, array in arrays.items():
        if file != ROWS:
            content.update(np.ascontiguousarray(array).data)
        write_array(stage.folder / file, array)
    height, width, channels = split.stored.shape[1:]
    report = SourceReport(
        num_train=0,
        num_validation=0,
        num_test=len(split),
        class_names=class_names,
        image_shape=(channels, height, width),
        content_sha256=content.hexdigest(),
        train_class_counts=(),
        subset=name,
    )
    return stage.finish(report, list(arrays), started)
