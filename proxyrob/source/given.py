"""The user's own images: parquet, folders of images, ``.npz``."""

import time
from pathlib import Path

from proxyrob.config.source import FolderSource, NpzSource, OwnSource, ParquetSource
from proxyrob.errors import DataIntegrityError
from proxyrob.source.arrays import open_arrays, require_file
from proxyrob.source.cut import spool_images, write_cut
from proxyrob.source.encoded import open_folder, open_parquet
from proxyrob.source.fingerprint import locate_files, verify_source
from proxyrob.source.formats import ImageFile
from proxyrob.source.splits import SourceReport
from proxyrob.storage import Stage
from proxyrob.types import OnProgress, no_progress


def prepare_given(config: OwnSource, *, stage: Stage, on_progress: OnProgress = no_progress) -> SourceReport:
    """Read the training and the test images, verify them, cut the validation split and write the splits.

    Raises ``DataIntegrityError`` naming the file and the row when images differ in size or channels, cannot be decoded, or
    have a label outside the classes; when training and test classes differ; when the files are not those of
    ``config.sha256``. Raises ``ValueError`` when there are fewer images than asked for.
    """
    if (report := stage.finished(SourceReport)) is not None:
        return report
    started = time.monotonic()
    verify_source(config)
    places = locate_files(config)
    train_file, test_file = (open_given(config, path) for path in places)
    names = _class_names(config, train_file, test_file)
    train, test = spool_images(
        stage,
        (train_file, test_file),
        places,
        num_classes=None if names is None else len(names),
        on_progress=on_progress,
    )
    if names is None:
        names = tuple(str(label) for label in range(int(train.labels.max()) + 1))
    return write_cut(config, train, test, class_names=names, stage=stage, started=started)


def open_given(config: OwnSource, path: Path) -> ImageFile:
    """One file, folder or pattern of a source, in the layout that the source says."""
    match config:
        case ParquetSource():
            return open_parquet(path, channels=config.channels)
        case FolderSource():
            return open_folder(path, channels=config.channels)
        case NpzSource():
            require_file(path)
            return open_arrays(path, "npz")


def _class_names(config: OwnSource, train: ImageFile, test: ImageFile) -> tuple[str, ...] | None:
    """The configuration's names, or the files'; ``None`` where the classes are the labels that occur."""
    if train.class_names != test.class_names:
        raise DataIntegrityError(
            f"{config.train} has the classes {_listed(train.class_names)}, {config.test} has {_listed(test.class_names)}; "
            "training and test images must be of the same classes in the same order"
        )
    if config.class_names is None or train.class_names is None:
        return config.class_names or train.class_names
    if len(config.class_names) != len(train.class_names):
        raise DataIntegrityError(
            f"source.class_names has {len(config.class_names)} names, but {config.train} has the classes "
            f"{_listed(train.class_names)}; give one name for each, in that order"
        )
    return config.class_names


def _listed(names: tuple[str, ...] | None) -> str:
    return "without names" if names is None else ", ".join(names)
