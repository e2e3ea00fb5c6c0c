"""scikit-learn's handwritten digits, split for robust training (Alpaydin & Kaynak 1998, UCI «Optical Recognition»)."""

import hashlib
import time
from typing import cast

import numpy as np
from jaxtyping import Int64, UInt8
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.utils import Bunch

from proxyrob.config.source import DigitsSource
from proxyrob.errors import DataIntegrityError
from proxyrob.rng import Streams
from proxyrob.source.splits import SourceReport, SplitName, write_splits
from proxyrob.storage import Stage
from proxyrob.types import OnProgress, no_progress

NUM_IMAGES = 1797
CONTENT_SHA256 = "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382"


def prepare_digits(config: DigitsSource, *, seed: int, stage: Stage, on_progress: OnProgress = no_progress) -> SourceReport:
    """Verify the digits, split them by class and write the splits.

    The test split is cut off first; training and validation images come from what is left. Grey levels 0–16 become the
    nearest of 256 levels.

    Randomness: ``source/split``. Raises ``ValueError`` when the splits do not fit into the data set or leave a class
    out, and ``DataIntegrityError`` when the data set is not the known one.
    """
    if (report := stage.finished(SourceReport)) is not None:
        return report
    started = time.monotonic()
    images, labels = _verified()
    wanted = config.num_train + config.num_validation + config.num_test
    if wanted > NUM_IMAGES:
        raise ValueError(
            f"expected source.num_train + source.num_validation + source.num_test of at most {NUM_IMAGES}, got {wanted}"
        )
    # not a Generator: scikit-learn takes none
    generator = np.random.RandomState(Streams(seed).entropy("source/split") % 2**32)
    rows = {}
    rest = np.arange(NUM_IMAGES)
    for name, count in (("test", config.num_test), ("validation", config.num_validation), ("train", config.num_train)):
        rows[name], rest = _take(rest, labels, count, generator, name)
    names: tuple[SplitName, ...] = ("train", "validation", "test")
    splits: dict[SplitName, tuple[UInt8[np.ndarray, "n h w c"], Int64[np.ndarray, " n"]]] = {
        name: (images[rows[name]], labels[rows[name]]) for name in names
    }
    report = write_splits(stage, splits, class_names=tuple("0123456789"), started=started)
    on_progress(1, 1)
    return report


def _verified() -> tuple[UInt8[np.ndarray, "n h w c"], Int64[np.ndarray, " n"]]:
    data = cast(Bunch, load_digits())  # a tuple only with return_X_y=True
    images = np.rint(data.images[..., None] * (255.0 / 16.0)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    found = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if found != CONTENT_SHA256:
        raise DataIntegrityError(
            f"the digits inside scikit-learn are not the known ones: expected sha256 {CONTENT_SHA256}, got {found}; "
            "reinstall scikit-learn from the lock file"
        )
    return images, labels


def _take(
    rest: Int64[np.ndarray, " m"], labels: Int64[np.ndarray, " n"], count: int, generator: np.random.RandomState, name: str
) -> tuple[Int64[np.ndarray, " count"], Int64[np.ndarray, " left"]]:
    num_classes = int(labels.max()) + 1
    if count < num_classes:
        raise ValueError(f"expected source.num_{name} of at least {num_classes}, one image for each class, got {count}")
    if count == len(rest):
        return rest, rest[:0]
    if len(rest) - count < num_classes:
        raise ValueError(
            f"source.num_{name}={count} would leave {len(rest) - count} of {NUM_IMAGES} digits over, fewer than one for each "
            "class; take them all or fewer"
        )
    taken, left = train_test_split(rest, train_size=count, stratify=labels[rest], random_state=generator)
    return np.sort(taken), np.sort(left)
