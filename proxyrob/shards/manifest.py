"""The shard format: ``shard-000000.npy`` (uint8 NHWC) and ``manifest.json``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from pydantic import ValidationError

from proxyrob.errors import DataIntegrityError
from proxyrob.storage import Report
from proxyrob.storage.files import read_array, sha256_of, verify_file, write_json

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


class ShardEntry(Report):
    """One shard: images ``first_id`` to ``first_id + num_images - 1``."""

    name: str
    num_images: int
    first_id: int
    size_bytes: int
    sha256: str


class ShardManifest(Report):
    """What a set of synthetic images is made of, and from what."""

    version: int
    image_shape: tuple[int, int, int]
    generator: str
    source_sha256: str
    sampler: dict[str, Any]
    seed: int
    shards: tuple[ShardEntry, ...]

    @property
    def num_images(self) -> int:
        return sum(shard.num_images for shard in self.shards)


def shard_name(number: int) -> str:
    """``shard-000042``, without an ending."""
    return f"shard-{number:06d}"


def write_manifest(
    folder: Path,
    *,
    shards: list[tuple[str, int, int]],
    image_shape: tuple[int, int, int],
    generator: str,
    source_sha256: str,
    sampler: dict[str, Any],
    seed: int,
) -> ShardManifest:
    """Hash every shard of ``shards`` (name, first id, number of images) and write the manifest.

    ``image_shape`` is (h, w, c); ``generator`` the digest of what sampled the images.
    """
    entries = []
    for name, first_id, num_images in shards:
        path = folder / f"{name}.npy"
        entries.append(
            ShardEntry(
                name=name, num_images=num_images, first_id=first_id, size_bytes=path.stat().st_size, sha256=sha256_of(path)
            )
        )
    manifest = ShardManifest(
        version=MANIFEST_VERSION,
        image_shape=image_shape,
        generator=generator,
        source_sha256=source_sha256,
        sampler=sampler,
        seed=seed,
        shards=tuple(entries),
    )
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def read_manifest(folder: Path) -> ShardManifest:
    """Read a manifest.

    Raises ``DataIntegrityError`` when there is none, it is of a newer version or cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataIntegrityError(f"{folder} holds no finished set of images ({MANIFEST} is missing); sample it again")
    try:
        content = json.loads(path.read_bytes())
        version = content["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataIntegrityError(f"{path} cannot be read as a manifest of version {MANIFEST_VERSION}: {error}") from error
    if version != MANIFEST_VERSION:
        raise DataIntegrityError(
            f"{path} has version {version}, this program reads version {MANIFEST_VERSION}; upgrade proxyrob"
        )
    try:
        manifest = ShardManifest.model_validate(content)
    except ValidationError as error:
        raise DataIntegrityError(f"{path} cannot be read as a manifest of version {MANIFEST_VERSION}: {error}") from error
    return manifest


def read_shard(folder: Path, entry: ShardEntry, image_shape: tuple[int, int, int]) -> UInt8[np.ndarray, "n h w c"]:
    """One shard's images, its hash, type and shape checked.

    Raises ``DataIntegrityError`` naming the shard and its expected hash.
    """
    path = folder / f"{entry.name}.npy"
    verify_file(path, entry.sha256, f"delete {path} and run again: only this shard is sampled anew")
    images = read_array(path)
    if images.dtype != np.uint8 or images.shape != (entry.num_images, *image_shape):
        raise DataIntegrityError(
            f"{path}: expected uint8 images of shape {(entry.num_images, *image_shape)}, got {images.dtype} {images.shape}"
        )
    return images
