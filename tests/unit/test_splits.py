"""Splits of real images on disk."""

import numpy as np
import pytest
import torch

from proxyrob.errors import DataIntegrityError
from proxyrob.source import Split, read_split, source_report
from proxyrob.source.splits import SplitName, write_splits
from proxyrob.storage import Stage
from proxyrob.storage.files import sha256_of
from tests.conftest import MakeStage
from tests.toys import damage, tiny_split

CLASSES = ("cat", "dog", "fox")


def _write(stage: Stage, train: Split, other: Split | None = None) -> Stage:
    other = other or tiny_split(6, classes=3, seed=1)
    splits: dict[SplitName, Split] = {"train": train, "validation": other, "test": other}
    write_splits(stage, {name: (split.stored, split.labels) for name, split in splits.items()}, class_names=CLASSES)
    return stage


def test_images_have_channels_first_and_keep_their_labels() -> None:
    """A split gives float images in [0,1] and int64 labels that can be written to."""
    split = tiny_split(4, classes=2, shape=(3, 5, 2))
    assert (split.images.shape, split.images.dtype) == ((4, 2, 3, 5), torch.float32)
    assert split.images[1, 1, 2, 4] == split.stored[1, 2, 4, 1] / np.float32(255)
    assert split.targets.tolist() == [0, 1, 0, 1]
    split.targets[0] = 9
    assert split.labels[0] == 0


def test_the_first_images_are_the_first() -> None:
    """``first`` cuts images and labels alike, and more than there are is all."""
    split = tiny_split(6, classes=3)
    assert np.array_equal(split.first(2).stored, split.stored[:2])
    assert (split.first(2).labels.tolist(), len(split.first(2)), len(split.first(99))) == ([0, 1], 2, 6)


def test_a_report_says_what_was_written(make_stage: MakeStage) -> None:
    """Sizes, shape (channels first), names and the images of each class."""
    stage = _write(make_stage("source"), tiny_split(7, classes=3, shape=(3, 5, 2)), tiny_split(4, classes=3, shape=(3, 5, 2)))
    report = source_report(stage)
    assert (report.num_train, report.num_validation, report.num_test) == (7, 4, 4)
    assert (report.image_shape, report.class_names, report.train_class_counts) == ((2, 3, 5), CLASSES, (3, 2, 2))


def test_the_content_hash_changes_with_one_pixel_or_label(make_stage: MakeStage) -> None:
    """Whatever made the images, equal images have equal hashes and different ones different."""
    base = tiny_split(6, classes=3)
    pixel, label = base.stored.copy(), base.labels.copy()
    pixel[-1, -1, -1, -1] ^= 1
    label[-1] = 0
    stages = [
        _write(make_stage("source", k=k), split)
        for k, split in enumerate([base, base, Split(pixel, base.labels), Split(base.stored, label)])
    ]
    hashes = [source_report(stage).content_sha256 for stage in stages]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_a_class_without_training_images_is_refused_by_name(make_stage: MakeStage) -> None:
    """A model cannot learn a class it never sees; the stage stays unfinished."""
    stage = make_stage("source")
    with pytest.raises(DataIntegrityError, match="the training split has no image of class dog, fox; take more"):
        _write(stage, Split(tiny_split(3).stored, np.zeros(3, np.int64)))
    assert stage.record() is None


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_label_outside_the_classes_is_refused(make_stage: MakeStage, wrong: int) -> None:
    """A label that has no name is refused with the range that was found."""
    split = tiny_split(6, classes=3)
    labels = split.labels.copy()
    labels[0] = wrong
    with pytest.raises(DataIntegrityError, match=r"the train split has labels from -?\d to \d, but there are 3 classes"):
        _write(make_stage("source"), Split(split.stored, labels))


def test_a_source_that_is_not_finished_is_refused(make_stage: MakeStage) -> None:
    """Nobody trains on a source that is not there, and the message says what to run."""
    stage = make_stage("source")
    with pytest.raises(DataIntegrityError, match="holds no finished source; delete the folder"):
        source_report(stage)
    with pytest.raises(DataIntegrityError, match="holds no finished source; delete the folder"):
        read_split(stage, "test")


@pytest.mark.parametrize("part", ["images", "labels"])
def test_an_altered_split_is_named_with_its_hash(make_stage: MakeStage, part: str) -> None:
    """A flipped byte of images or labels is found when the split is read; other splits can still be read."""
    stage = _write(make_stage("source"), tiny_split(6, classes=3))
    path = stage.folder / f"train-{part}.npy"
    expected = sha256_of(path)
    damage(path)
    with pytest.raises(DataIntegrityError, match=rf"train-{part}\.npy is damaged: expected sha256 {expected}"):
        read_split(stage, "train")
    assert len(read_split(stage, "test")) == 6
