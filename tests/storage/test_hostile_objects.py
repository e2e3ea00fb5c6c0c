"""Objects that somebody else has put into the bucket, on a real S3 server."""

import json
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from torch import nn

from proxyrob.errors import CheckpointMismatch, DataIntegrityError
from proxyrob.shards import MANIFEST, find_sets, is_complete, read_manifest, shard_file, verify_set
from proxyrob.storage import DataPlace
from proxyrob.storage.checkpoints import Checkpoints
from proxyrob.storage.store import Store
from tests.hostile import MARKER, pickled, torch_bomb
from tests.s3_server import BUCKET
from tests.toys import stage_in, tiny_split, write_images

pytestmark = pytest.mark.usefixtures("s3_environment")


@pytest.fixture
def place(s3_store: Store, tmp_path: Path) -> DataPlace:
    """A place on S3 with a cache on this machine."""
    return DataPlace(s3_store.uri, tmp_path / "cache")


def put(place: DataPlace, key: str, content: bytes) -> None:
    """Store an object past the program, under whatever name."""
    prefix = place.uri.removeprefix(f"s3://{BUCKET}/")
    boto3.client("s3").put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=content)


@pytest.mark.parametrize("content", [pickled, lambda folder: torch_bomb()], ids=["a pickle", "eight gigabytes"])
def test_the_copy_of_a_checkpoint_is_another_file(content: Callable[[Path], bytes], place: DataPlace, tmp_path: Path) -> None:
    """With a record that fits it: refused with the remedy when another machine wants to go on from it; nothing is run."""
    one, other = (stage_in(tmp_path / name, "train") for name in ("one", "other"))
    parts = {"model": nn.Linear(2, 2)}
    with Checkpoints(one, place) as checkpoints:
        checkpoints.save(1, parts)
    (key,) = (found.key for found in place.open().list("checkpoints/") if found.key.endswith(".pt"))
    planted = content(tmp_path)
    place.open().write(key, planted, replace=True)
    info = place.open().stat(key)
    assert info is not None
    record = json.loads(place.open().read(key.replace(".pt", ".json")))
    record |= {"size_bytes": info.size_bytes, "sha256": info.sha256}
    place.open().write(key.replace(".pt", ".json"), json.dumps(record).encode(), replace=True)
    with (
        Checkpoints(other, place) as checkpoints,
        pytest.raises(CheckpointMismatch, match=r"it holds more than tensors and plain values; delete .*s3://.* and run again"),
    ):
        checkpoints.load(parts, "cpu")
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize(
    "key", ["a/../../other/manifest.json", "../manifest.json", "a//manifest.json", "a/./manifest.json", "a\\..\\manifest.json"]
)
def test_a_key_that_means_another_place_is_no_object(key: str, place: DataPlace) -> None:
    """A listing leaves it out, so that nobody makes a path of it; the sets beside it are found as before."""
    write_images(place.below("mine"), tiny_split(6).stored)
    put(place, key, b'{"version": 1}')
    assert {found.key for found in place.open().list()} == {
        "mine/manifest.json",
        "mine/shard-000000.npy",
        "mine/shard-000001.npy",
    }
    assert [found.name for found in find_sets(place)] == ["mine"]


def test_a_manifest_that_leads_out_of_the_bucket(place: DataPlace, tmp_path: Path) -> None:
    """A name of a shard that is a path is refused with the manifest's; nothing is written on this machine."""
    write_images(place, tiny_split(6).stored)
    content = json.loads(place.open().read(MANIFEST))
    content["shards"][0]["name"] = "../../../../tmp/shard"
    put(place, MANIFEST, json.dumps(content).encode())
    message = (
        r"s3://.*/manifest\.json cannot be read as a manifest of version 1 \(shards\.0\.name: .*; put the former file back"
    )
    with pytest.raises(DataIntegrityError, match=message):
        read_manifest(place)
    assert not is_complete(place)
    assert not (tmp_path / "cache").exists()


def test_a_manifest_of_megabytes(place: DataPlace) -> None:
    """What is too large for a manifest is refused by its size, before it is fetched."""
    put(place, MANIFEST, b" " * ((64 << 20) + 1))
    with pytest.raises(DataIntegrityError, match=r"manifest\.json has 67108865 bytes, and at most 67108864 are read of such a"):
        read_manifest(place)


def test_a_shard_that_is_larger_than_announced(place: DataPlace, tmp_path: Path) -> None:
    """It is not fetched: no disk is filled by an object in place of another."""
    manifest = write_images(place, tiny_split(6).stored)
    put(place, manifest.shards[0].key, bytes(1 << 20))
    size = manifest.shards[0].size_bytes
    with pytest.raises(DataIntegrityError, match=rf"shard-000000\.npy has 1048576 bytes, expected {size}; delete it"):
        shard_file(place, manifest.shards[0])
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size]
    assert [finding.state for finding in verify_set(place, ()).findings] == ["damaged"]
