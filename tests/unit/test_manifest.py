"""The shard format: plain files, a manifest that is written last, and every damage named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxyrob.errors import DataIntegrityError
from proxyrob.shards import MANIFEST, ShardEntry, ShardManifest, read_manifest, read_shard, shard_name, write_manifest
from proxyrob.storage.files import sha256_of, write_array
from tests.toys import damage, tiny_split

SHAPE = (4, 4, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of 5 and 2 images, with their manifest."""
    images = tiny_split(7).stored
    write_array(tmp_path / "shard-000000.npy", images[:5])
    write_array(tmp_path / "shard-000001.npy", images[5:])
    write_manifest(
        tmp_path,
        shards=[("shard-000000", 0, 5), ("shard-000001", 5, 2)],
        image_shape=SHAPE,
        generator="generator",
        source_sha256="source",
        sampler={"kind": "jitter", "sigma": 0.1},
        seed=3,
    )
    return tmp_path


def _change(folder: Path, **values: Any) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, **values}))


def test_shards_are_numbered_in_six_digits() -> None:
    """Names sort in the order of the images."""
    assert (shard_name(0), shard_name(42), shard_name(123456)) == ("shard-000000", "shard-000042", "shard-123456")


def test_a_manifest_says_what_the_images_are_made_of(folder: Path) -> None:
    """Shape, generator, source, sampler, seed, and of every shard its range, size and hash."""
    manifest = read_manifest(folder)
    assert (manifest.image_shape, manifest.generator, manifest.source_sha256) == (SHAPE, "generator", "source")
    assert (manifest.sampler, manifest.seed, manifest.num_images) == ({"kind": "jitter", "sigma": 0.1}, 3, 7)
    first, second = manifest.shards
    assert (first.name, first.first_id, first.num_images) == ("shard-000000", 0, 5)
    assert (second.name, second.first_id, second.num_images) == ("shard-000001", 5, 2)
    assert first.sha256 == sha256_of(folder / "shard-000000.npy")
    assert second.size_bytes == (folder / "shard-000001.npy").stat().st_size


def test_shards_are_plain_arrays(folder: Path) -> None:
    """Any program with numpy reads a shard without this one."""
    assert np.array_equal(np.load(folder / "shard-000000.npy", allow_pickle=False), tiny_split(7).stored[:5])


def test_a_folder_without_manifest_holds_no_finished_images(tmp_path: Path) -> None:
    """The manifest is written last, so without it the shards may be some of many."""
    write_array(tmp_path / "shard-000000.npy", tiny_split(5).stored)
    with pytest.raises(DataIntegrityError, match=rf"{tmp_path} holds no finished set of images \(manifest\.json is missing\)"):
        read_manifest(tmp_path)


def test_a_manifest_of_a_newer_version_is_refused(folder: Path) -> None:
    """A format that this program does not know is not guessed at; the message says which versions and what to do."""
    _change(folder, version=2)
    with pytest.raises(DataIntegrityError, match=r"has version 2, this program reads version 1; upgrade proxyrob"):
        read_manifest(folder)


def test_a_newer_manifest_with_unknown_fields_is_refused_as_newer(folder: Path) -> None:
    """A newer version will know more fields: what helps is «upgrade», not a list of fields that are not permitted."""
    _change(folder, version=2, compression="zstd")
    with pytest.raises(DataIntegrityError, match=r"has version 2, this program reads version 1; upgrade proxyrob"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}'])
def test_a_manifest_that_cannot_be_read_is_named(folder: Path, text: str) -> None:
    """A truncated or foreign manifest is an integrity error with its path, not a pydantic error."""
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DataIntegrityError, match=r"manifest\.json cannot be read as a manifest of version 1"):
        read_manifest(folder)


def test_a_damaged_shard_is_named_with_its_hash_and_the_remedy(folder: Path) -> None:
    """A flipped byte in one shard names that shard, its expected hash and what to delete; the other can be read."""
    manifest = read_manifest(folder)
    damage(folder / "shard-000001.npy")
    with pytest.raises(DataIntegrityError) as error:
        read_shard(folder, manifest.shards[1], SHAPE)
    path = folder / "shard-000001.npy"
    for part in (str(path), f"expected sha256 {manifest.shards[1].sha256}", f"delete {path} and run again"):
        assert part in str(error.value)
    assert len(read_shard(folder, manifest.shards[0], SHAPE)) == 5


def test_a_missing_shard_is_named(folder: Path) -> None:
    """A shard that is gone is named, not skipped."""
    manifest = read_manifest(folder)
    (folder / "shard-000000.npy").unlink()
    with pytest.raises(DataIntegrityError, match=r"shard-000000\.npy is missing"):
        read_shard(folder, manifest.shards[0], SHAPE)


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
def test_a_shard_of_another_shape_or_type_is_refused(folder: Path, array: np.ndarray) -> None:
    """Even with a matching hash, images that are not what the manifest says are refused with both shapes."""
    manifest = read_manifest(folder)
    write_array(folder / "shard-000000.npy", array)
    entry = ShardEntry.model_validate({**manifest.shards[0].model_dump(), "sha256": sha256_of(folder / "shard-000000.npy")})
    with pytest.raises(DataIntegrityError, match=r"shard-000000\.npy: expected uint8 images of shape \(5, 4, 4, 1\), got "):
        read_shard(folder, entry, SHAPE)


def test_a_manifest_is_frozen(folder: Path) -> None:
    """Nobody changes a manifest after it was read."""
    with pytest.raises(ValueError, match="frozen"):
        read_manifest(folder).seed = 4  # pyright: ignore[reportAttributeAccessIssue]  # that it fails is the point
    assert isinstance(read_manifest(folder), ShardManifest)
