"""The digits: verified, split by class, and split alike whatever the sizes of the other splits."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from proxyrob.config import DigitsSource
from proxyrob.source import Split, prepare_digits, read_split, source_report
from proxyrob.source.splits import SplitName
from proxyrob.storage import Stage
from tests.conftest import MakeStage
from tests.toys import SMALL_DIGITS, Recorder, files_below

NAMES: tuple[SplitName, ...] = ("train", "validation", "test")


def _rows(split: Split) -> list[bytes]:
    """Images with their labels, as comparable bytes."""
    return [image.tobytes() + bytes([label]) for image, label in zip(split.stored, split.labels.tolist(), strict=True)]


def _prepare(make_stage: MakeStage, seed: int = 0, **sizes: int) -> Stage:
    config = SMALL_DIGITS.replace(**sizes)
    stage = make_stage("source", seed=seed, **config.dump())
    prepare_digits(config, seed=seed, stage=stage)
    return stage


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A source that uses all 1,797 digits."""
    stage = Stage("source", "0" * 64, tmp_path_factory.mktemp("everything"), {})
    prepare_digits(DigitsSource(num_train=700, num_validation=300, num_test=797), seed=0, stage=stage)
    return stage


def test_the_splits_have_the_sizes_that_were_asked_for(digits: Stage) -> None:
    """Sizes, shape, classes and counts are in the report and in the files."""
    report = source_report(digits)
    splits = {name: read_split(digits, name) for name in NAMES}
    assert {name: len(split) for name, split in splits.items()} == {"train": 60, "validation": 30, "test": 60}
    assert (report.num_train, report.num_validation, report.num_test) == (60, 30, 60)
    assert (report.image_shape, report.class_names) == ((1, 8, 8), tuple("0123456789"))
    assert report.train_class_counts == tuple(np.bincount(splits["train"].labels).tolist())
    assert all(split.stored.dtype == np.uint8 and split.stored.shape[1:] == (8, 8, 1) for split in splits.values())


def test_the_splits_are_disjoint(everything: Stage) -> None:
    """No image is in two splits, and together they are the whole data set."""
    rows = [row for name in NAMES for row in _rows(read_split(everything, name))]
    assert len(rows) == len(set(rows)) == 1797


def test_the_splits_are_stratified(everything: Stage) -> None:
    """Every class has the same share of every split, to within one image of rounding at each cut."""
    splits = {name: np.bincount(read_split(everything, name).labels, minlength=10) for name in NAMES}
    total = sum(splits.values())
    for counts in splits.values():
        assert np.abs(counts - total * counts.sum() / 1797).max() < 2.0


def test_grey_levels_use_the_whole_range(everything: Stage) -> None:
    """Levels 0 to 16 become 17 of 256 levels, from 0 to 255, none of them lost."""
    levels = np.unique(read_split(everything, "train").stored)
    assert levels.tolist() == [round(level * 255 / 16) for level in range(17)]


def test_images_keep_their_labels(digits: Stage) -> None:
    """A split does not mix labels up: each of its images is in scikit-learn's data under the same label."""
    images, labels = load_digits(return_X_y=True)
    known = {np.rint(i * 15.9375).astype(np.uint8).tobytes() + bytes([k]) for i, k in zip(images, labels, strict=True)}
    assert all(row in known for name in NAMES for row in _rows(read_split(digits, name)))


def test_the_test_split_does_not_depend_on_the_training_size(make_stage: MakeStage, digits: Stage) -> None:
    """More training or validation images leave the test split as it is, so that results stay comparable."""
    larger = _prepare(make_stage, num_train=200, num_validation=50)
    assert _rows(read_split(larger, "test")) == _rows(read_split(digits, "test"))
    assert len(read_split(larger, "train")) == 200


def test_the_seed_decides_the_splits(make_stage: MakeStage, digits: Stage) -> None:
    """The same seed gives the same files byte for byte, another seed another split."""
    again, other = _prepare(make_stage, seed=0), _prepare(make_stage, seed=1)
    assert source_report(again).content_sha256 == source_report(digits).content_sha256
    assert source_report(other).content_sha256 != source_report(digits).content_sha256
    assert set(_rows(read_split(other, "test"))) != set(_rows(read_split(digits, "test")))


def test_files_of_a_source_are_read_only(digits: Stage) -> None:
    """Nobody alters real images by accident."""
    names = files_below(digits.folder) - {"stage.json"}
    assert names == {f"{name}-{part}.npy" for name in NAMES for part in ("images", "labels")}
    assert all((digits.folder / name).stat().st_mode & 0o222 == 0 for name in names)


def test_a_finished_source_is_not_prepared_again(digits: Stage) -> None:
    """A second call returns the report and does no work."""
    recorder = Recorder()
    before = digits.record_path.stat().st_mtime_ns
    assert prepare_digits(SMALL_DIGITS, seed=0, stage=digits, on_progress=recorder) == source_report(digits)
    assert (recorder.told, digits.record_path.stat().st_mtime_ns) == ([], before)


def test_splits_that_do_not_fit_are_refused(make_stage: MakeStage) -> None:
    """1,798 of 1,797 images cannot be had; the message says which settings and how many there are."""
    with pytest.raises(ValueError, match=r"source\.num_train .* of at most 1797, got 1798"):
        _prepare(make_stage, num_train=1000, num_validation=400, num_test=398)


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_a_split_smaller_than_its_classes_is_refused(make_stage: MakeStage, name: SplitName) -> None:
    """Nine images cannot show ten classes; ten can."""
    with pytest.raises(ValueError, match=rf"expected source\.num_{name} of at least 10, one image for each class, got 9"):
        _prepare(make_stage, **{f"num_{name}": 9})
    assert len(read_split(_prepare(make_stage, **{f"num_{name}": 10}), name)) == 10


def test_a_remainder_smaller_than_its_classes_is_refused(make_stage: MakeStage) -> None:
    """Digits that are left over have to be enough to be stratified too; taking every last one is allowed."""
    with pytest.raises(ValueError, match=r"source\.num_train=1692 would leave 5 of 1797 digits over.*take them all or fewer"):
        _prepare(make_stage, num_train=1692, num_validation=40, num_test=60)
    assert len(read_split(_prepare(make_stage, num_train=1697, num_validation=40, num_test=60), "train")) == 1697


def test_nothing_is_left_behind_by_a_refused_source(make_stage: MakeStage, tmp_path: Path) -> None:
    """Wrong sizes are found before any file is written."""
    with pytest.raises(ValueError, match="expected source"):
        _prepare(make_stage, num_train=9)
    assert files_below(tmp_path) == set()
