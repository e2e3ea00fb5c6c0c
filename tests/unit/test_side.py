"""Side tables: they belong to their shard row by row, and an index that is written last says of which images they are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from proxyrob.errors import DataIntegrityError
from proxyrob.label import suspicious_shards
from proxyrob.shards import (
    INDEX,
    ShardManifest,
    SideEntry,
    SideIndex,
    read_side_index,
    read_side_table,
    write_side_index,
    write_side_table,
)
from proxyrob.storage import DataPlace
from tests.toys import damage, tiny_split, write_images

NAMES = ("a", "b", "c")


@pytest.fixture
def manifest(tmp_path: Path) -> ShardManifest:
    """Images in shards of 5 and 2."""
    return write_images(DataPlace.of(tmp_path / "images"), tiny_split(7).stored)


@pytest.fixture
def place(tmp_path: Path) -> DataPlace:
    """Where the side tables go."""
    return DataPlace.of(tmp_path / "labels")


def _table(first: int, labels: list[int], kept: list[bool] | None = None) -> pd.DataFrame:
    ids = first + np.arange(len(labels))
    return pd.DataFrame({"id": ids, "label": labels, "kept": kept or [True] * len(labels), "score": ids / 10})


def _write(place: DataPlace, manifest: ShardManifest) -> SideIndex:
    write_side_table(place, "shard-000000", _table(0, [0, 1, 1, 2, 0], [True, True, False, True, True]))
    write_side_table(place, "shard-000001", _table(5, [2, 2], [False, True]))
    return write_side_index(place, manifest, {"rule": "toy"}, NAMES)


def test_an_index_counts_its_tables(place: DataPlace, manifest: ShardManifest) -> None:
    """Kept and dropped images of each class, in each table and in all, and of which images and by whom they are."""
    index = _write(place, manifest)
    assert read_side_index(place, manifest) == index
    first, second = index.tables
    assert (first.kept_per_class, first.dropped_per_class, first.num_kept) == ((2, 1, 1), (0, 1, 0), 4)
    assert (second.kept_per_class, second.dropped_per_class, second.num_kept) == ((0, 0, 1), (0, 0, 1), 1)
    assert (index.kept_per_class, index.dropped_per_class, index.num_images) == ((2, 1, 2), (0, 1, 1), 7)
    assert (index.images_sha256, index.labeler, index.class_names) == (manifest.sha256, {"rule": "toy"}, NAMES)


def test_tables_are_read_as_they_were_written(place: DataPlace, manifest: ShardManifest) -> None:
    """All columns, or those that are asked for."""
    index = _write(place, manifest)
    expected = _table(5, [2, 2], [False, True])
    pd.testing.assert_frame_equal(read_side_table(place, index.tables[1]), expected)
    pd.testing.assert_frame_equal(read_side_table(place, index.tables[1], ["score"]), pd.DataFrame({"score": expected.score}))
    with pytest.raises(ValueError, match=r"shard-000001\.parquet has no column beauty, taste; it has id, label, kept, score"):
        read_side_table(place, index.tables[1], ["id", "taste", "beauty"])


def test_a_table_that_is_there_is_left_as_it_is(place: DataPlace) -> None:
    """Of two labelers of one shard the first one's table stays: both would have written the same."""
    write_side_table(place, "shard-000000", _table(0, [0]))
    write_side_table(place, "shard-000000", _table(0, [1]))
    assert pd.read_parquet(Path(place.uri) / "shard-000000.parquet").label.tolist() == [0]


@pytest.mark.parametrize(
    "table",
    [_table(5, [0, 1]).iloc[::-1], _table(5, [0]), _table(5, [0, 1, 2]), _table(0, [0, 1]), _table(5, [0, 1]).iloc[:0]],
    ids=["wrong order", "too short", "too long", "of other images", "empty"],
)
def test_a_table_of_other_rows_is_refused(place: DataPlace, manifest: ShardManifest, table: pd.DataFrame) -> None:
    """A table that does not have a row for each image of its shard, in order, is named with the images it should have."""
    write_side_table(place, "shard-000000", _table(0, [0] * 5))
    write_side_table(place, "shard-000001", table)
    text = rf"shard-000001\.parquet has labels for {len(table)} images, not for images 5 to 6 in order; delete it"
    with pytest.raises(DataIntegrityError, match=text):
        write_side_index(place, manifest, {}, NAMES)
    assert not (Path(place.uri) / INDEX).exists()


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_a_label_outside_the_classes_is_refused(place: DataPlace, manifest: ShardManifest, label: int) -> None:
    """File and row of the first such label are named, and how many classes there are."""
    write_side_table(place, "shard-000000", _table(0, [0, 1, 2, label, label]))
    write_side_table(place, "shard-000001", _table(5, [0, 1]))
    text = rf"shard-000000\.parquet, row 3: label {label} is outside the 3 classes 0 to 2"
    with pytest.raises(DataIntegrityError, match=text):
        write_side_index(place, manifest, {}, NAMES)


def test_an_index_of_other_images_is_refused(place: DataPlace, manifest: ShardManifest, tmp_path: Path) -> None:
    """Labels that lie beside other images than they were made for are not used."""
    _write(place, manifest)
    other = write_images(DataPlace.of(tmp_path / "other"), tiny_split(7, seed=1).stored)
    with pytest.raises(DataIntegrityError, match=r"index\.json has labels for other images than those it lies beside"):
        read_side_index(place, other)


def test_an_index_of_a_newer_version_is_refused(place: DataPlace, manifest: ShardManifest) -> None:
    """A newer format is not guessed at, whatever else it knows: the remedy is to upgrade."""
    _write(place, manifest)
    path = Path(place.uri) / INDEX
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2, "compression": "zstd"}))
    with pytest.raises(DataIntegrityError, match=r"has version 2, this program reads version 1; upgrade proxyrob"):
        read_side_index(place, manifest)


def test_without_index_there_are_no_finished_labels(place: DataPlace, manifest: ShardManifest) -> None:
    """The index is written last, so without it the tables may be some of many."""
    write_side_table(place, "shard-000000", _table(0, [0] * 5))
    with pytest.raises(DataIntegrityError, match=r"holds no finished labels \(index\.json is missing\); label again"):
        read_side_index(place, manifest)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1}', b"\xff\xfe\x00"])
def test_an_index_that_cannot_be_read_is_named(place: DataPlace, manifest: ShardManifest, content: bytes) -> None:
    """A truncated or foreign index is an integrity error with its path."""
    _write(place, manifest)
    (Path(place.uri) / INDEX).write_bytes(content)
    with pytest.raises(DataIntegrityError, match=r"index\.json cannot be read (as JSON )?\(.*\); delete it and label again"):
        read_side_index(place, manifest)


def test_a_damaged_or_missing_table_is_named(place: DataPlace, manifest: ShardManifest) -> None:
    """The file, its expected hash and what to delete are in the text."""
    first, second = _write(place, manifest).tables
    damage(Path(place.uri) / first.key)
    text = rf"{first.key} is damaged: expected sha256 {first.sha256}.*; delete .*{first.key} and .*index\.json and label again"
    with pytest.raises(DataIntegrityError, match=text):
        read_side_table(place, first)
    (Path(place.uri) / second.key).unlink()
    with pytest.raises(DataIntegrityError, match=rf"{second.key} is missing"):
        read_side_table(place, second)


def test_labelling_again_replaces_the_index(place: DataPlace, manifest: ShardManifest) -> None:
    """A table that was deleted and made anew gets an index that fits it."""
    _write(place, manifest)
    (Path(place.uri) / "shard-000001.parquet").unlink()
    write_side_table(place, "shard-000001", _table(5, [1, 1]))
    index = write_side_index(place, manifest, {"rule": "toy"}, NAMES)
    assert read_side_index(place, manifest) == index
    assert read_side_table(place, index.tables[1]).label.tolist() == [1, 1]


# Shards whose classes are far off


def _index(counts: list[tuple[int, ...]], dropped: list[tuple[int, ...]] | None = None) -> SideIndex:
    nothing: list[tuple[int, ...]] = [(0,) * len(counts[0])] * len(counts)
    tables = [
        SideEntry(
            name=f"shard-{k:06d}",
            num_images=sum(kept) + sum(out),
            kept_per_class=kept,
            dropped_per_class=out,
            size_bytes=1,
            sha256="0" * 64,
        )
        for k, (kept, out) in enumerate(zip(counts, dropped or nothing, strict=True))
    ]
    about: dict[str, Any] = {"version": 1, "images_sha256": "", "labeler": {}}
    return SideIndex(**about, class_names=tuple(map(str, range(len(counts[0])))), tables=tuple(tables))


def test_a_shard_of_one_class_is_reported() -> None:
    """Among nine balanced shards one that has a single class is found, and no other."""
    assert suspicious_shards(_index([*[(10,) * 10] * 5, (100, *[0] * 9), *[(10,) * 10] * 4])) == ("shard-000005",)


def test_a_set_sorted_by_class_is_reported() -> None:
    """Where every shard has a class of its own, every shard is."""
    assert len(suspicious_shards(_index([tuple(50 * (k == shard) for k in range(5)) for shard in range(5)]))) == 5


def test_a_shuffled_set_is_not_reported() -> None:
    """Shards of any size of a set in random order are left alone, also where a class is rare or one shard is short."""
    rng = np.random.default_rng(0)
    for shares in ([0.1] * 10, [0.9, 0.0999, 0.0001], [0.5, 0.5]):
        sizes = [1000] * 30 + [7]
        counts = [tuple(int(count) for count in rng.multinomial(size, shares)) for size in sizes]
        assert suspicious_shards(_index(counts)) == ()


@pytest.mark.parametrize("counts", [[(5, 0, 5)], [(5, 0), (7, 0)], [(0, 0, 3), (0, 0, 1)]])
def test_nothing_is_said_where_nothing_can_be_compared(counts: list[tuple[int, ...]]) -> None:
    """A single shard, or a single class, is not suspicious."""
    assert suspicious_shards(_index(counts)) == ()


def test_dropped_images_count_too() -> None:
    """What the filter dropped was sampled all the same: a shard is not suspicious because more of a class was dropped."""
    kept = [*[(100, 100)] * 9, (20, 100)]
    assert suspicious_shards(_index(kept)) == ("shard-000009",)
    assert suspicious_shards(_index(kept, [*[(0, 0)] * 9, (80, 0)])) == ()
