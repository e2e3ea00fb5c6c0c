"""Near-duplicates of test images: all are found, nothing else, and what contains many is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyrob.errors import DataIntegrityError
from proxyrob.label import LabelReport, LeakFinder, adopt_labels, find_leaks, leaks
from proxyrob.label.rule import LEAK
from proxyrob.source import Split
from proxyrob.storage import DataPlace, Stage
from tests.conftest import MakeStage
from tests.toys import read_labels, tiny_split, write_images, write_set, write_source

SHAPE = (8, 8, 3)


def _images(count: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Random images that are far from each other, but leave room for noise in both directions."""
    return np.random.default_rng(seed).integers(40, 210, (count, *shape), dtype=np.uint8)


def _noisy(images: np.ndarray, level: int, seed: int = 1) -> np.ndarray:
    """Each value moved up or down by ``level``: a root mean square difference of just that."""
    signs = np.random.default_rng(seed).choice([-level, level], images.shape)
    return (images.astype(np.int64) + signs).astype(np.uint8)


def _by_hand(images: np.ndarray, test: np.ndarray, max_level: float) -> tuple[np.ndarray, np.ndarray]:
    """The least root mean square difference, in levels, to each test image or its mirror image, and whether it is a copy."""
    both = np.stack([test, test[:, :, ::-1]]).astype(np.float64)
    distances = np.sqrt(((images[:, None, None].astype(np.float64) - both[None]) ** 2).mean(axis=(3, 4, 5))).min(axis=1)
    return distances, distances.min(axis=1) <= max_level


def test_exact_and_mirrored_copies_are_found() -> None:
    """An image that equals a test image or its mirror image is found with the row of that test image; others are not."""
    test, images = _images(20), _images(10, seed=7)
    images[3], images[8] = test[17], test[4, :, ::-1]
    assert LeakFinder(test).find(images).tolist() == [-1, -1, -1, 17, -1, -1, -1, -1, 4, -1]


@pytest.mark.parametrize(("level", "is_found"), [(1, True), (3, True), (5, False), (12, False)])
def test_noise_below_the_threshold_is_found_and_none_above(level: int, is_found: bool) -> None:
    """A copy whose values differ by 1 or 3 of 255 levels is one, at 5 and more it is another picture: the threshold is 4."""
    test = _images(12)
    found = LeakFinder(test).find(_noisy(test, level))
    assert found.tolist() == (list(range(12)) if is_found else [-1] * 12)


def test_a_shifted_or_inverted_image_is_another_picture() -> None:
    """Only copies and mirror images count: nothing is said of crops, turns or other colours."""
    test = _images(6)
    for other in (np.roll(test, 1, axis=1), test[:, ::-1], 255 - test, test[..., ::-1]):
        assert LeakFinder(test).find(np.ascontiguousarray(other)).tolist() == [-1] * 6


def test_the_nearest_of_several_is_named() -> None:
    """Where several test images are near, the row is that of the nearest."""
    base = _images(1)
    test = np.concatenate([_noisy(base, 3), base, _noisy(base, 2)])
    assert LeakFinder(test).find(base).tolist() == [1]


@pytest.mark.parametrize("shape", [(8, 8, 1), (4, 4, 3), (12, 8, 3), (5, 7, 3), (9, 9, 1)])
@pytest.mark.parametrize("pairs_at_once", [1, 4096])
def test_finding_equals_comparing_every_pair(
    shape: tuple[int, int, int], pairs_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With copies at distances on both sides of the threshold, the findings are those of a plain comparison of all pairs."""
    monkeypatch.setattr(leaks, "PAIRS_AT_ONCE", pairs_at_once)
    rng, test = np.random.default_rng(3), _images(30, shape=shape)
    base = np.concatenate([test, test[:, :, ::-1], _images(20, seed=5, shape=shape)])
    scales = rng.choice([0.0, 2.0, 3.5, 4.5, 8.0], len(base)).reshape(-1, 1, 1, 1)
    images = np.rint(base + scales * rng.standard_normal(base.shape)).clip(0, 255).astype(np.uint8)
    distances, is_copy = _by_hand(images, test, 4.0)
    found = LeakFinder(test).find(images)
    assert 10 < is_copy.sum() < len(images) - 25
    assert ((found >= 0) == is_copy).all()
    rows = np.flatnonzero(is_copy)
    assert np.allclose(distances[rows, found[rows]], distances[rows].min(axis=1), atol=1e-4)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.floats(0.5, 30.0), st.sampled_from([(4, 4, 1), (8, 4, 3), (3, 5, 1)]))
def test_every_threshold_is_kept(seed: int, level: float, shape: tuple[int, int, int]) -> None:
    """For any threshold, images near and far are told apart as a comparison of all pairs does, but for rounding at it."""
    rng = np.random.default_rng(seed)
    test = rng.integers(0, 256, (6, *shape), dtype=np.uint8)
    noise = rng.choice([0.5, 0.9, 1.1, 2.0], (12, 1, 1, 1)) * level * rng.standard_normal((12, *shape))
    images = np.rint(np.concatenate([test, test[:, :, ::-1]]) + noise).clip(0, 255).astype(np.uint8)
    distances, is_copy = _by_hand(images, test, level)
    is_clear = np.abs(distances.min(axis=1) - level) > 1e-3
    found = LeakFinder(test, max_rms=level / 255).find(images)
    assert ((found >= 0) == is_copy)[is_clear].all()


def test_large_bright_images_at_the_threshold_are_found() -> None:
    """Where squares of thousands of bright pixels cancel, copies just below the threshold are found all the same."""
    test = np.random.default_rng(0).integers(200, 252, (100, 33, 35, 3), dtype=np.uint8)
    images = _noisy(test, 4)
    images[:, 0, 0, 0] = test[:, 0, 0, 0]  # one value of 3,465 less: just below 4
    assert LeakFinder(test).find(images).tolist() == list(range(100))


# In a set


@pytest.fixture
def source(make_stage: MakeStage) -> Stage:
    """A source of 300 training images of ten classes, and 20 other test images."""
    stage = make_stage("source")
    test = Split(_images(20, seed=2), np.arange(20) % 10)
    write_source(stage, Split(_images(300), np.arange(300) % 10), test=test)
    return stage


def _leaky(copies: int) -> np.ndarray:
    """200 images of which ``copies``, seven apart, are mirror images of test images."""
    images, test = _images(200, seed=5), _images(20, seed=2)
    places = 7 * np.arange(copies)
    images[places] = test[:copies, :, ::-1]
    return images


def _adopt(source: Stage, images: np.ndarray, tmp_path: Path, stage: Stage) -> tuple[LabelReport, pd.DataFrame]:
    made = write_set(tmp_path / "set", images, np.arange(len(images)) % 10, shard_size=64)
    labels = made.images.below("labels/adopted")
    given: dict[str, Any] = {"source": source, "images": made.images, "given": made.labels, "labels": labels}
    report = adopt_labels(**given, stage=stage)
    return report, read_labels(made.images, labels)


def test_labeling_drops_copies_with_their_reason(source: Stage, tmp_path: Path, make_stage: MakeStage) -> None:
    """A copy is not kept, says why and of which test image, and is counted; all others keep their label."""
    report, table = _adopt(source, _leaky(2), tmp_path, make_stage("labels"))
    assert (report.num_leaked, report.num_kept, report.num_images, report.num_disagree) == (2, 198, 200, 0)
    dropped = table[~table.kept]
    assert dropped.id.tolist() == [0, 7]
    assert dropped.near_test.tolist() == [0, 1]
    assert set(dropped.reason) == {LEAK}
    assert (table.near_test[table.kept] == -1).all()
    assert table.label.tolist() == (np.arange(200) % 10).tolist()
    assert report.dropped_per_class == (1, 0, 0, 0, 0, 0, 0, 1, 0, 0)


def test_a_set_with_many_copies_is_refused(source: Stage, tmp_path: Path, make_stage: MakeStage) -> None:
    """More than one copy in a hundred is no accident: the set is refused with both numbers, and the stage stays unfinished."""
    stage = make_stage("labels")
    with pytest.raises(DataIntegrityError, match=r"3 of 200 images of .* are near-duplicates of test images: the set seems to"):
        _adopt(source, _leaky(3), tmp_path, stage)
    assert stage.record() is None


def test_the_leaks_of_a_set_can_be_listed(source: Stage, tmp_path: Path) -> None:
    """Every copy with the test image it is of, across shards; a set of another size is refused."""
    place = DataPlace.of(tmp_path / "set")
    write_images(place, _leaky(12), shard_size=30)
    report = find_leaks(source=source, images=place)
    assert (report.num_images, report.num_copies) == (200, 12)
    assert report.pairs == tuple((7 * k, k) for k in range(12))
    other = DataPlace.of(tmp_path / "other")
    write_images(other, tiny_split(3).stored)
    with pytest.raises(ValueError, match=r"has images of shape \(4, 4, 1\), the test images have \(8, 8, 3\)"):
        find_leaks(source=source, images=other)


def test_given_labels_keep_their_other_columns(source: Stage, tmp_path: Path, make_stage: MakeStage) -> None:
    """What a published set says of its images, such as a score, can be used to choose among them after adoption."""
    images = _images(40, seed=5)
    columns = {"realism": np.linspace(0, 1, 40)}
    made = write_set(tmp_path / "set", images, np.arange(40) % 10, columns=columns, shard_size=64)
    labels = made.images.below("labels/adopted")
    adopt_labels(source=source, images=made.images, given=made.labels, labels=labels, stage=make_stage("labels"))
    table = read_labels(made.images, labels)
    assert table.realism.tolist() == columns["realism"].tolist()
    assert table.kept.all()
