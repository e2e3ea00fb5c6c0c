"""CIFAR-10, CIFAR-100, and CIFAR-10's automobiles against its trucks (Krizhevsky 2009), counted and cut."""

import contextlib
import io
import time
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock

from proxyrob.config.source import Cifar2Source, Cifar10Source, Cifar100Source
from proxyrob.errors import DataIntegrityError, SourceUnavailable
from proxyrob.source.cut import spool_images, write_cut
from proxyrob.source.encoded import open_parquet
from proxyrob.source.fingerprint import locate_files, verify_source
from proxyrob.source.splits import SourceReport, Split
from proxyrob.storage import Stage
from proxyrob.types import OnProgress, no_progress

SHAPE = (32, 32, 3)
NUM_TRAIN, NUM_TEST = 50_000, 10_000

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_NAMES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
    forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
    mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
    sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree
    wolf woman worm
    """.split()  # noqa: SIM905  (a list literal of a hundred names is a page)
)
CIFAR2_NAMES = ("automobile", "truck")

CifarConfig = Cifar10Source | Cifar100Source | Cifar2Source


class CifarData(Protocol):
    """What torchvision's CIFAR data sets hold."""

    data: np.ndarray
    targets: list[int]
    classes: list[str]


def prepare_cifar(config: CifarConfig, *, stage: Stage, downloads: Path, on_progress: OnProgress = no_progress) -> SourceReport:
    """Get the images, verify and count them, cut the validation split and write the splits.

    torchvision downloads below ``downloads`` and checks the files' MD5 sums; files at ``config.path`` are checked against
    ``config.sha256`` instead, and may hold fewer images than the data set. CIFAR-2 is the images of two classes of
    CIFAR-10, automobile (0) and truck (1), in the order of the data set.

    Raises ``SourceUnavailable`` when the download fails, ``DataIntegrityError`` when the images are not those of the data
    set, and ``ValueError`` when there are fewer than asked for.
    """
    if (report := stage.finished(SourceReport)) is not None:
        return report
    started = time.monotonic()
    names = CIFAR100_NAMES if isinstance(config, Cifar100Source) else CIFAR10_NAMES
    if config.files is None:
        train, test = download_cifar(config, downloads, names)
        on_progress(1, 1)
    else:
        verify_source(config)
        places = locate_files(config)
        files = open_parquet(places[0], image_shape=SHAPE), open_parquet(places[1], image_shape=SHAPE)
        train, test = spool_images(stage, files, places, num_classes=len(names), on_progress=on_progress)
    for split, found, full in (("training", train, NUM_TRAIN), ("test", test, NUM_TEST)):
        check_counts(found, full, len(names), f"{config.kind}'s {split} images")
    if isinstance(config, Cifar2Source):
        chosen = [CIFAR10_NAMES.index(name) for name in CIFAR2_NAMES]
        train, test, names = select_classes(train, chosen), select_classes(test, chosen), CIFAR2_NAMES
    return write_cut(config, train, test, class_names=names, stage=stage, started=started)


def download_cifar(config: CifarConfig, downloads: Path, names: tuple[str, ...]) -> tuple[Split, Split]:
    """Training and test images through torchvision, which downloads what is not below ``downloads`` yet.

    Raises ``SourceUnavailable`` when that fails and ``DataIntegrityError`` when what came is not whole.
    """
    from torchvision.datasets import CIFAR10, CIFAR100  # takes a second, which whoever has files of his own need not pay

    dataset = CIFAR100 if isinstance(config, Cifar100Source) else CIFAR10
    downloads.mkdir(parents=True, exist_ok=True)
    try:
        # its progress bar, on standard error, would tear ours apart
        with FileLock(downloads / f".{dataset.filename}.lock"), contextlib.redirect_stderr(io.StringIO()):
            train, test = (dataset(downloads, train=is_train, download=True) for is_train in (True, False))
    except (OSError, RuntimeError) as error:
        raise SourceUnavailable(
            f"{config.kind} could not be downloaded from {dataset.url} ({error}); put {dataset.filename} into {downloads}, or "
            "give a folder with the hub's parquet files: --set source.path=FOLDER"
        ) from error
    splits = split_of(train, names), split_of(test, names)
    for split, full in zip(splits, (NUM_TRAIN, NUM_TEST), strict=True):
        if len(split) != full:
            raise DataIntegrityError(f"{downloads} holds {len(split)} images of {config.kind}, expected {full}; delete it")
    return splits


def split_of(data: CifarData, names: tuple[str, ...]) -> Split:
    """A data set of torchvision's as a split.

    Raises ``DataIntegrityError`` when its images or classes are not those of the data set.
    """
    if tuple(data.classes) != names or data.data.dtype != np.uint8 or data.data.shape != (len(data.targets), *SHAPE):
        raise DataIntegrityError(
            f"expected uint8 images of 32×32×3 in the {len(names)} known classes, got {data.data.dtype} of shape "
            f"{data.data.shape}, {len(data.targets)} labels and {len(data.classes)} classes; install torchvision from the "
            "lock file"
        )
    return Split(np.ascontiguousarray(data.data), np.array(data.targets, np.int64))


def check_counts(split: Split, full: int, num_classes: int, what: str) -> None:
    """A whole set has the same number of images in every class; a part of it may have any.

    Raises ``DataIntegrityError`` when there are more images than the data set has, or a whole set is unbalanced.
    """
    counts = np.bincount(split.labels, minlength=num_classes)
    if len(split) > full:
        raise DataIntegrityError(f"{what} are {len(split)}, but the data set has {full}; give one file of one data set")
    if len(split) == full and (wrong := np.flatnonzero(counts != full // num_classes)).size:
        raise DataIntegrityError(
            f"{what} are {full}, but {counts[wrong[0]]} of them have label {wrong[0]}, expected {full // num_classes} of each "
            "class; this is another data set, or its labels were altered"
        )


def select_classes(split: Split, classes: list[int]) -> Split:
    """The images of some classes, in their order, labelled by the place of their class in ``classes``."""
    rows = np.flatnonzero(np.isin(split.labels, classes))
    place = np.full(max(int(split.labels.max(initial=0)), *classes) + 1, -1, np.int64)
    place[classes] = np.arange(len(classes))
    return Split(split.stored[rows], place[split.labels[rows]])
