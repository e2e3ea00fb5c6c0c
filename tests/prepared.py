"""Sources as a run prepares them, and their images as rows that can be compared."""

from typing import Any

from proxyrob.config import DigitsSource
from proxyrob.config.source import FileSource
from proxyrob.source import SourceReport, Split, pin_source, prepare_source, read_split
from proxyrob.source.splits import SplitName
from proxyrob.storage import Stage

NAMES: tuple[SplitName, ...] = ("train", "validation", "test")


def prepare(config: FileSource | DigitsSource, stage: Stage, seed: int = 0, **given: Any) -> SourceReport:
    """The splits of a source whose files are first given their fingerprint; downloads lie beside the stages."""
    return prepare_source(pin_source(config), seed=seed, stage=stage, downloads=stage.folder.parent / "downloads", **given)


def rows_of(split: Split) -> list[bytes]:
    """Images with their labels, as comparable bytes."""
    return [image.tobytes() + bytes([label]) for image, label in zip(split.stored, split.labels.tolist(), strict=True)]


def splits_of(stage: Stage) -> dict[SplitName, list[bytes]]:
    """The rows of every split."""
    return {name: rows_of(read_split(stage, name)) for name in NAMES}


def with_label(split: Split, row: int, label: int) -> Split:
    """A split with another label in one row."""
    labels = split.labels.copy()
    labels[row] = label
    return Split(split.stored, labels)
