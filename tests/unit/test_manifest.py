"""The shard format: plain files, a manifest that is written last, and every damage named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxyrob.errors import DataIntegrityError
from proxyrob.shards import (
    MANIFEST,
    ShardEntry,
    ShardManifest,
    describe_shards,
    in_workers_order,
    read_manifest,
    read_shard,
    shard_name,
    write_manifest,
    write_shard,
)
from proxyrob.storage import DataPlace
from proxyrob.storage.files import sha256_of, write_array
from tests.toys import cut_shards, damage, files_below, tiny_split, write_images

SHAPE = (4, 4, 1)


@pytest.fixture
def place(tmp_path: Path) -> DataPlace:
    """Two shards of 5 and 2 images, with their manifest."""
    place = DataPlace.of(tmp_path)
    write_images(place, tiny_split(7).stored)
    return place


def _change(folder: Path, **values: Any) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, **values}))


def test_shards_are_numbered_in_six_digits() -> None:
    """Names sort in the order of the images."""
    assert (shard_name(0), shard_name(42), shard_name(123456)) == ("shard-000000", "shard-000042", "shard-123456")


def test_a_manifest_says_what_the_images_are_made_of(place: DataPlace, tmp_path: Path) -> None:
    """Shape, generator, source, sampler, seed, and of every shard its range, size and hash."""
    manifest = read_manifest(place)
    assert (manifest.image_shape, manifest.generator, manifest.source_sha256) == (SHAPE, "generator", "source")
    assert (manifest.sampler, manifest.seed, manifest.num_images) == ({"kind": "toy"}, 3, 7)
    first, second = manifest.shards
    assert (first.name, first.first_id, first.num_images) == ("shard-000000", 0, 5)
    assert (second.name, second.first_id, second.num_images) == ("shard-000001", 5, 2)
    assert first.sha256 == sha256_of(tmp_path / "shard-000000.npy")
    assert second.size_bytes == (tmp_path / "shard-000001.npy").stat().st_size


def test_shards_are_plain_arrays(place: DataPlace, tmp_path: Path) -> None:
    """Any program with numpy reads a shard without this one."""
    assert np.array_equal(np.load(tmp_path / "shard-000000.npy", allow_pickle=False), tiny_split(7).stored[:5])


def test_a_folder_without_manifest_holds_no_finished_images(tmp_path: Path) -> None:
    """The manifest is written last, so without it the shards may be some of many."""
    write_array(tmp_path / "shard-000000.npy", tiny_split(5).stored)
    with pytest.raises(DataIntegrityError, match=rf"{tmp_path} holds no finished set of images \(manifest\.json is missing\)"):
        read_manifest(DataPlace.of(tmp_path))


def test_a_manifest_of_a_newer_version_is_refused(place: DataPlace, tmp_path: Path) -> None:
    """A format that this program does not know is not guessed at; the message says which versions and what to do."""
    _change(tmp_path, version=2)
    with pytest.raises(DataIntegrityError, match=r"has version 2, this program reads version 1; upgrade proxyrob"):
        read_manifest(place)


def test_a_newer_manifest_with_unknown_fields_is_refused_as_newer(place: DataPlace, tmp_path: Path) -> None:
    """A newer version will know more fields: what helps is «upgrade», not a list of fields that are not permitted."""
    _change(tmp_path, version=2, compression="zstd")
    with pytest.raises(DataIntegrityError, match=r"has version 2, this program reads version 1; upgrade proxyrob"):
        read_manifest(place)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}'])
def test_a_manifest_that_cannot_be_read_is_named(place: DataPlace, tmp_path: Path, text: str) -> None:
    """A truncated or foreign manifest is an integrity error with its path, not a pydantic error."""
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataIntegrityError, match=r"manifest\.json cannot be read as (JSON|a manifest of version 1) \(.*; put"):
        read_manifest(place)


def test_a_damaged_shard_is_named_with_its_hash_and_the_remedy(place: DataPlace, tmp_path: Path) -> None:
    """A flipped byte in one shard names that shard, its expected hash and what to delete; the other can be read."""
    manifest = read_manifest(place)
    damage(tmp_path / "shard-000001.npy")
    with pytest.raises(DataIntegrityError) as error:
        read_shard(place, manifest.shards[1], SHAPE)
    path = tmp_path / "shard-000001.npy"
    for part in (str(path), f"expected sha256 {manifest.shards[1].sha256}", f"delete {path} and run again"):
        assert part in str(error.value)
    assert len(read_shard(place, manifest.shards[0], SHAPE)) == 5


def test_a_missing_shard_is_named(place: DataPlace, tmp_path: Path) -> None:
    """A shard that is gone is named, not skipped."""
    manifest = read_manifest(place)
    (tmp_path / "shard-000000.npy").unlink()
    with pytest.raises(DataIntegrityError, match=r"shard-000000\.npy is missing"):
        read_shard(place, manifest.shards[0], SHAPE)


@pytest.mark.parametrize(
    "array",
    [
        tiny_split(5).stored[:4],
        tiny_split(5, shape=(4, 5, 1)).stored,
        tiny_split(5).stored.astype(np.float32),
        tiny_split(5).stored[..., 0],
    ],
    ids=["too few", "another shape", "another type", "no channels"],
)
def test_a_shard_of_another_shape_or_type_is_refused(place: DataPlace, tmp_path: Path, array: np.ndarray) -> None:
    """Even with a matching hash, images that are not what the manifest says are refused with both shapes."""
    manifest = read_manifest(place)
    write_array(tmp_path / "shard-000000.npy", array)
    entry = ShardEntry.model_validate({**manifest.shards[0].model_dump(), "sha256": sha256_of(tmp_path / "shard-000000.npy")})
    with pytest.raises(DataIntegrityError, match=r"shard-000000\.npy: expected uint8 images of shape \(5, 4, 4, 1\), got "):
        read_shard(place, entry, SHAPE)


def test_a_manifest_is_frozen(place: DataPlace) -> None:
    """Nobody changes a manifest after it was read."""
    with pytest.raises(ValueError, match="frozen"):
        read_manifest(place).seed = 4  # pyright: ignore[reportAttributeAccessIssue]  # that it fails is the point
    assert isinstance(read_manifest(place), ShardManifest)


# Several writers


def test_a_shard_that_is_there_is_left_as_it_is(place: DataPlace, tmp_path: Path) -> None:
    """Of two writers of one shard the first one's stays, and the other is told so; nothing else is left behind."""
    before = (tmp_path / "shard-000000.npy").read_bytes()
    assert not write_shard(place, "shard-000000", tiny_split(5, seed=1).stored)
    assert write_shard(place, "shard-000007", tiny_split(5, seed=1).stored)
    assert (tmp_path / "shard-000000.npy").read_bytes() == before
    assert files_below(tmp_path) == {"shard-000000.npy", "shard-000001.npy", "shard-000007.npy", MANIFEST}


def test_writing_the_same_manifest_again_is_no_error(place: DataPlace) -> None:
    """Every worker that finishes writes the manifest; they are all the same one."""
    write_manifest(place, read_manifest(place))
    assert read_manifest(place).num_images == 7


def test_the_manifest_of_another_set_is_not_overwritten(place: DataPlace, tmp_path: Path) -> None:
    """A place that holds another set is refused by name, and its manifest stays."""
    before = (tmp_path / MANIFEST).read_bytes()
    other = ShardManifest.model_validate({**read_manifest(place).model_dump(), "seed": 4})
    with pytest.raises(DataIntegrityError, match=r"manifest\.json describes another set than the shards beside it"):
        write_manifest(place, other)
    assert (tmp_path / MANIFEST).read_bytes() == before


def test_a_manifest_needs_every_shard(place: DataPlace) -> None:
    """A shard that is not there is named before a manifest says that all are."""
    with pytest.raises(DataIntegrityError, match=r"shard-000002\.npy is missing; run again: only this shard is made anew"):
        describe_shards(place, shards=cut_shards(12, 5), image_shape=SHAPE, generator="", source_sha256="", sampler={}, seed=0)


def test_the_identity_of_a_set_is_that_of_its_manifest(place: DataPlace, tmp_path: Path) -> None:
    """Other images, or the same in another cut, have another identity; it is the hash of the file."""
    manifest = read_manifest(place)
    assert manifest.sha256 == sha256_of(tmp_path / MANIFEST)
    cut = write_images(DataPlace.of(tmp_path / "cut"), tiny_split(7).stored, shard_size=4)
    other = write_images(DataPlace.of(tmp_path / "other"), tiny_split(7, seed=1).stored)
    assert len({manifest.sha256, cut.sha256, other.sha256}) == 3


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_worker_takes_every_shard_once(count: int) -> None:
    """Wherever a worker begins, it comes to every shard, in their order around the end."""
    shards = list(range(count))
    order = in_workers_order(shards)
    assert sorted(order) == shards
    assert order == [(order[0] + k) % count for k in shards]
