"""Synthetic images seen through a filter and a subset: exactly the chosen rows, read as they are needed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyrob.config import SubsetConfig
from proxyrob.errors import DataIntegrityError
from proxyrob.mix import EpochOrder, SyntheticSet, SyntheticView, split_count
from proxyrob.mix.order import WINDOW
from proxyrob.rng import Streams
from tests.toys import damage, read_images, read_labels, tiny_split, write_set

NUM_IMAGES = 33
MakeSet = Callable[..., SyntheticSet]


@pytest.fixture
def votes() -> pd.DataFrame:
    """What the side tables say of 33 images of three classes: some dropped, scores with ties."""
    rng = np.random.default_rng(4)
    return pd.DataFrame(
        {
            "label": rng.integers(0, 3, NUM_IMAGES),
            "kept": rng.random(NUM_IMAGES) < 0.8,
            "first_confidence": rng.random(NUM_IMAGES),
            "second_confidence": rng.random(NUM_IMAGES),
            "realism": rng.integers(0, 9, NUM_IMAGES).astype(np.float64),
        }
    )


@pytest.fixture
def make_set(tmp_path: Path, votes: pd.DataFrame) -> MakeSet:
    """``make_set()``: the images that ``votes`` are of, in shards of four; keywords change its columns."""

    def make(**changed: Any) -> SyntheticSet:
        columns = {str(name): column.to_numpy() for name, column in votes.assign(**changed).items()}
        labels, kept = columns.pop("label"), columns.pop("kept")
        images = tiny_split(NUM_IMAGES).stored
        folder = tmp_path / f"set-{len(list(tmp_path.iterdir()))}"
        return write_set(folder, images, labels, kept=kept, columns=columns, shard_size=4, num_classes=3)

    return make


def _open(of: SyntheticSet, subset: SubsetConfig | None = None, *, window: int = WINDOW, seed: int = 0) -> SyntheticView:
    return SyntheticView(of, streams=Streams(seed), subset=subset, window=window)


def _ids(view: SyntheticView) -> list[int]:
    """The images of one epoch, sorted."""
    return sorted(view.take(0, len(view))[2].tolist())


def test_images_labels_and_ids_belong_together(synthetic: SyntheticSet) -> None:
    """Over an epoch every kept image comes once, with its own pixels and label; dropped ones are not there."""
    view = _open(synthetic)
    images, classes, ids = view.take(0, len(view))
    table, stored = read_labels(synthetic.images, synthetic.labels), read_images(synthetic.images)
    kept = table[table.kept]
    assert (images.dtype, classes.dtype, ids.dtype) == (np.uint8, np.int64, np.int64)
    assert sorted(ids.tolist()) == kept.id.tolist()
    assert 0 < len(kept) < len(table)
    assert np.array_equal(images, stored[ids])
    assert classes.tolist() == table.label[ids].tolist()


@pytest.mark.parametrize("window", [1, 5, 12, 30, 1000])
def test_reading_across_windows_equals_direct_indexing(make_set: MakeSet, votes: pd.DataFrame, window: int) -> None:
    """Whatever the window, three epochs read in odd pieces are the stored images of their ids, each once per epoch."""
    made = make_set()
    view, stored = _open(made, window=window), tiny_split(NUM_IMAGES).stored
    expected = np.flatnonzero(votes.kept).tolist()
    drawn, position = [], 0
    while position < 3 * len(view):
        count = min(7, 3 * len(view) - position)
        images, labels, ids = view.take(position, count)
        assert np.array_equal(images, stored[ids])
        assert labels.tolist() == votes.label[ids].tolist()
        drawn += ids.tolist()
        position += count
    epochs = [drawn[start : start + len(view)] for start in range(0, len(drawn), len(view))]
    assert [sorted(epoch) for epoch in epochs] == [expected] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    fresh = _open(made, window=window)
    assert fresh.take(2 * len(view) + 3, 9)[2].tolist() == drawn[2 * len(view) + 3 :][:9], "a resume finds its place"
    assert view.take(1, 5)[2].tolist() == drawn[1:6], "and so does who goes back"


def test_one_window_is_in_the_order_of_an_epoch(make_set: MakeSet, votes: pd.DataFrame) -> None:
    """A set that fits into one window is drawn in the order of its kept rows as one array."""
    view, kept = _open(make_set()), np.flatnonzero(votes.kept)
    order = EpochOrder(Streams(0), "mix/synthetic", len(kept))
    assert view.take(5, 60)[2].tolist() == kept[order.take(5, 60)].tolist()


def test_no_image_is_opened_before_it_is_needed(make_set: MakeSet) -> None:
    """Opening a set, also with a subset, reads no image: it works with damaged and missing ones, and reading names them."""
    made = make_set()
    damage(Path(made.images.uri) / "shard-000001.npy")
    (Path(made.images.uri) / "shard-000002.npy").unlink()
    for subset in (None, SubsetConfig(per_class=2), SubsetConfig(score="realism", top_share=0.5)):
        view = _open(made, subset)
        assert len(view) > 0
        assert view.image_shape == (4, 4, 1)
    with pytest.raises(DataIntegrityError, match=r"shard-00000[12]\.npy is (damaged|missing)"):
        _open(made).take(0, 1)


def test_only_the_files_of_two_windows_are_open(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the first images of a set of many windows opens the files of that window and of the next, and no others."""
    opened = []
    original = SyntheticView._open
    monkeypatch.setattr(SyntheticView, "_open", lambda view, number: opened.append(number) or original(view, number))
    view = _open(make_set(kept=np.ones(NUM_IMAGES, bool)), window=8)
    view.take(0, 3)
    view.close()
    first, second = view.order.windows(0)[:2]
    assert set(opened) <= {*first.parts.tolist(), *second.parts.tolist()}
    assert set(first.parts.tolist()) <= set(opened)
    assert len(first.parts) + len(second.parts) < 9


def test_a_damaged_side_table_is_named(make_set: MakeSet) -> None:
    """Labels are hashed before training on them."""
    made = make_set()
    damage(Path(made.labels.uri) / "shard-000001.parquet")
    with pytest.raises(DataIntegrityError, match=r"shard-000001\.parquet is damaged: expected sha256 .* label again"):
        _open(made).take(0, 1)


# Subsets


def _best_first(votes: pd.DataFrame, chosen: pd.Series, score: str) -> pd.DataFrame:
    """The chosen images by score, the highest first and of equal ones the first."""
    rows = np.flatnonzero(chosen)
    return votes.iloc[rows[np.argsort(-votes[score].to_numpy()[rows], kind="stable")]]


def _sure(votes: pd.DataFrame, least: float) -> pd.Series:
    return votes.kept & (votes[["first_confidence", "second_confidence"]].max(axis=1) >= least)


def test_all_is_what_the_filter_kept(make_set: MakeSet, votes: pd.DataFrame) -> None:
    """Without a subset, and with one that leaves nothing out, exactly the kept rows are there."""
    for subset in (None, SubsetConfig()):
        assert _ids(_open(make_set(), subset)) == np.flatnonzero(votes.kept).tolist()


@pytest.mark.parametrize("least", [0.2, 0.7, 0.95])
def test_a_least_confidence_leaves_the_surer_images(make_set: MakeSet, votes: pd.DataFrame, least: float) -> None:
    """The surer of both labelers decides, and what the filter dropped stays dropped."""
    expected = np.flatnonzero(_sure(votes, least)).tolist()
    assert 0 < len(expected) < NUM_IMAGES
    assert _ids(_open(make_set(), SubsetConfig(min_confidence=least))) == expected


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_best_share_is_chosen_by_score(make_set: MakeSet, votes: pd.DataFrame, share: float) -> None:
    """Of the kept images the given share with the highest score; of equal ones the first."""
    kept = _best_first(votes, votes.kept, "realism")
    expected = sorted(kept.index[: round(share * len(kept))])
    assert _ids(_open(make_set(), SubsetConfig(score="realism", top_share=share))) == expected


def test_a_quota_takes_the_first_of_each_class(make_set: MakeSet, votes: pd.DataFrame) -> None:
    """Without a score the first kept images of each class, exactly as many of each."""
    expected = sorted(index for label in range(3) for index in votes[votes.kept & (votes.label == label)].index[:3])
    view = _open(make_set(), SubsetConfig(per_class=3))
    assert _ids(view) == expected
    assert np.bincount(view.take(0, len(view))[1]).tolist() == [3, 3, 3]


def test_a_quota_takes_the_best_of_each_class(make_set: MakeSet, votes: pd.DataFrame) -> None:
    """With a score those of each class with the highest."""
    best = _best_first(votes, votes.kept, "realism")
    expected = sorted(index for label in range(3) for index in best[best.label == label].index[:2])
    assert _ids(_open(make_set(), SubsetConfig(score="realism", per_class=2))) == expected


def test_conditions_apply_one_after_the_other(make_set: MakeSet, votes: pd.DataFrame) -> None:
    """First the confidence, then the best share of what is left, then the quota of what is left of that."""
    left = _best_first(votes, _sure(votes, 0.4), "realism")
    left = left.iloc[: round(0.8 * len(left))]
    expected = sorted(index for label in range(3) for index in left[left.label == label].index[:1])
    subset = SubsetConfig(min_confidence=0.4, score="realism", top_share=0.8, per_class=1)
    assert _ids(_open(make_set(), subset)) == expected


def test_a_confidence_can_be_the_score(make_set: MakeSet, votes: pd.DataFrame) -> None:
    """Ranking by the very column that the least confidence is asked of reads it once."""
    left = _best_first(votes, _sure(votes, 0.4), "first_confidence")
    subset = SubsetConfig(min_confidence=0.4, score="first_confidence", top_share=0.5)
    assert _ids(_open(make_set(), subset)) == sorted(left.index[: round(0.5 * len(left))])


def test_a_subset_is_read_across_windows(make_set: MakeSet, votes: pd.DataFrame) -> None:
    """Files of which the subset leaves nothing are skipped, and every chosen row still comes once per epoch."""
    made = make_set(kept=np.arange(NUM_IMAGES) >= 8, label=np.arange(NUM_IMAGES) % 3)
    view = _open(made, SubsetConfig(per_class=4), window=3)
    assert _ids(view) == list(range(8, 20))
    assert sorted(view.take(len(view), len(view))[2].tolist()) == list(range(8, 20))


def test_a_column_that_is_not_there_is_named(make_set: MakeSet) -> None:
    """A score that nobody wrote is refused with the columns there are."""
    with pytest.raises(ValueError, match=r"shard-000000\.parquet has no column beauty; it has id, label, kept, "):
        _open(make_set(), SubsetConfig(score="beauty", top_share=0.5))


def test_a_quota_that_a_class_cannot_fill_is_refused(make_set: MakeSet, votes: pd.DataFrame) -> None:
    """The class and how many images it has are named, and what to change."""
    counts = np.bincount(votes.label[votes.kept])
    quota = int(counts.min()) + 1
    text = (
        rf"class {counts.argmin()} has {counts.min()} images to choose from, fewer than train\.subset\.per_class={quota}; lower"
    )
    with pytest.raises(DataIntegrityError, match=text):
        _open(make_set(), SubsetConfig(per_class=quota))
    assert len(_open(make_set(), SubsetConfig(per_class=quota - 1))) == 3 * (quota - 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_no_number_is_refused(make_set: MakeSet, votes: pd.DataFrame, value: float) -> None:
    """An image that cannot be ranked is named; one that the filter dropped does not matter."""
    dropped, kept = (int(np.flatnonzero(of)[2]) for of in (~votes.kept, votes.kept))
    subset = SubsetConfig(score="realism", top_share=0.5)
    _open(make_set(realism=votes.realism.where(votes.index != dropped, value)), subset)
    with pytest.raises(DataIntegrityError, match=rf"image {kept} has score {value}"):
        _open(make_set(realism=votes.realism.where(votes.index != kept, value)), subset)


def test_a_score_of_text_is_refused(make_set: MakeSet) -> None:
    """A column without numbers ranks nothing: it is named with the place it lies at."""
    with pytest.raises(ValueError, match=r"labels/toy: column 'reason' holds .*, expected numbers to rank images by"):
        _open(make_set(), SubsetConfig(score="reason", top_share=0.5))


def test_nothing_left_is_refused(make_set: MakeSet) -> None:
    """A filter or a subset that leaves no image is refused when the set is opened, with both remedies."""
    text = r"leaves none of the 33 images of .*; lower label\.threshold or the conditions of train\.subset"
    with pytest.raises(DataIntegrityError, match=text):
        _open(make_set(kept=np.zeros(NUM_IMAGES, bool)))
    with pytest.raises(DataIntegrityError, match=text):
        _open(make_set(), SubsetConfig(min_confidence=1.0))


def test_labels_of_other_images_are_refused(make_set: MakeSet, tmp_path: Path) -> None:
    """Side tables that lie beside images they were not made for are refused before anything is drawn."""
    made = make_set()
    other = write_set(tmp_path / "other", tiny_split(NUM_IMAGES, seed=1).stored, np.zeros(NUM_IMAGES, np.int64), shard_size=4)
    with pytest.raises(DataIntegrityError, match="has labels for other images than those it lies beside"):
        _open(SyntheticSet(other.images, made.labels))


# Counts


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 500))
def test_a_count_is_split_in_proportion(weights: list[float], count: int) -> None:
    """The parts add up, each is within one of its exact share, and none is empty, or the split is refused."""
    exact = count * np.array(weights) / sum(weights)
    try:
        parts = split_count(count, weights)
    except ValueError:
        assert exact.min() < 1
        return
    assert sum(parts) == count
    assert all(part > 0 and abs(part - share) < 1 for part, share in zip(parts, exact, strict=True))


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 6))
def test_equal_weights_split_evenly(each: int, parts: int) -> None:
    """A count that can be divided is."""
    assert split_count(each * parts, [0.3] * parts) == (each,) * parts
