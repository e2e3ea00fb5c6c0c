"""The shard format: ``shard-000000.npy`` (uint8 NHWC) and ``manifest.json``."""

import hashlib
import io
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import numpy as np
from jaxtyping import UInt8
from pydantic import Field, ValidationError, model_validator

from proxyrob.errors import DataIntegrityError
from proxyrob.storage import DataPlace, Report
from proxyrob.storage.bounded import HEADER_BYTES, MOST_PIXELS, first_fault, parse_json
from proxyrob.storage.files import read_array
from proxyrob.storage.verified import hash_once

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
SHARD_NAME = r"^shard-[0-9]{6,}$"
REMEDY = "put the former file back, or delete it and make the set again"
T = TypeVar("T")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShardName = Annotated[str, Field(pattern=SHARD_NAME)]
Whole = Annotated[int, Field(ge=0)]


class ShardEntry(Report):
    """One shard: images ``first_id`` to ``first_id + num_images - 1``."""

    name: ShardName
    num_images: Whole
    first_id: Whole
    size_bytes: Whole
    sha256: Sha256

    @property
    def key(self) -> str:
        """The shard's file."""
        return f"{self.name}.npy"


class ShardManifest(Report):
    """What a set of synthetic images is made of, and from what."""

    version: int
    image_shape: tuple[int, int, int]
    generator: str
    source_sha256: str
    sampler: dict[str, Any]
    seed: int
    shards: tuple[ShardEntry, ...]

    @model_validator(mode="after")
    def _promises_what_its_files_hold(self) -> Self:
        """Whoever reads shards takes memory for as many images as it says here, before a file is opened."""
        height, width, channels = self.image_shape
        if min(self.image_shape) < 1 or height * width > MOST_PIXELS or channels > 4:
            raise ValueError(
                f"expected images (height, width, channels) of at most {MOST_PIXELS} pixels, got {self.image_shape}"
            )
        first = 0
        for shard in self.shards:
            header_bytes = shard.size_bytes - shard.num_images * height * width * channels
            if shard.first_id != first or not 0 < header_bytes <= HEADER_BYTES:
                raise ValueError(
                    f"{shard.name} is said to hold images {shard.first_id} to {shard.first_id + shard.num_images - 1} in "
                    f"{shard.size_bytes} bytes, which images of {self.image_shape} from {first} on do not fit"
                )
            first += shard.num_images
        return self

    @property
    def num_images(self) -> int:
        return sum(shard.num_images for shard in self.shards)

    def content(self) -> bytes:
        """The file."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n").encode()

    @property
    def sha256(self) -> str:
        """Identifies the set: every image's bytes, in order."""
        return hashlib.sha256(self.content()).hexdigest()


def shard_name(number: int) -> str:
    """``shard-000042``, without an ending."""
    return f"shard-{number:06d}"


def in_workers_order(shards: Sequence[T]) -> list[T]:
    """The shards from one on that differs between workers, then those before it.

    So that several workers share the work rather than repeat it; where each begins decides no content.
    """
    worker = hashlib.sha256(f"{socket.gethostname()} {os.getpid()}".encode()).digest()
    begin = int.from_bytes(worker[:4], "big") % len(shards)
    return [*shards[begin:], *shards[:begin]]


def write_shard(place: DataPlace, name: str, images: UInt8[np.ndarray, "n h w c"]) -> bool:
    """Store one shard, whole; ``False`` when another writer's is there already, which is the same by definition."""
    content = io.BytesIO()
    np.save(content, images, allow_pickle=False)
    return place.open().write(f"{name}.npy", content.getvalue())


def describe_shards(
    place: DataPlace,
    *,
    shards: list[tuple[str, int, int]],
    image_shape: tuple[int, int, int],
    generator: str,
    source_sha256: str,
    sampler: dict[str, Any],
    seed: int,
) -> ShardManifest:
    """The manifest of ``shards`` (name, first id, number of images), with the hash of each. Nothing is written.

    ``image_shape`` is (h, w, c); ``generator`` the digest of what sampled the images. Raises ``DataIntegrityError`` when
    a shard is missing or has the size of another.
    """
    store = place.open()
    entries = []
    for name, first_id, num_images in shards:
        found = store.stat(f"{name}.npy")
        if found is None:
            raise DataIntegrityError(f"{place.uri}/{name}.npy is missing; run again: only this shard is made anew")
        path = store.local_path(found.key)
        sha256 = hash_once(path) if path is not None else found.sha256
        if sha256 is None:
            raise DataIntegrityError(
                f"{place.uri}/{name}.npy was not written by this program: it carries no hash; delete it and run again"
            )
        entries.append(
            ShardEntry(name=name, num_images=num_images, first_id=first_id, size_bytes=found.size_bytes, sha256=sha256)
        )
    try:
        return ShardManifest(
            version=MANIFEST_VERSION,
            image_shape=image_shape,
            generator=generator,
            source_sha256=source_sha256,
            sampler=sampler,
            seed=seed,
            shards=tuple(entries),
        )
    except ValidationError as error:
        raise DataIntegrityError(
            f"{place.uri} holds shards of something else ({first_fault(error)}); delete them and run again"
        ) from error


def write_manifest(place: DataPlace, manifest: ShardManifest) -> None:
    """Write the file that says that all shards are there: the last one.

    Raises ``DataIntegrityError`` when the place holds the manifest of another set already.
    """
    if not place.open().write(MANIFEST, manifest.content()) and read_manifest(place) != manifest:
        raise DataIntegrityError(
            f"{place.uri}/{MANIFEST} describes another set than the shards beside it; move it away, or use another place"
        )


def read_manifest(place: DataPlace) -> ShardManifest:
    """Read a manifest.

    Raises ``DataIntegrityError`` when there is none, it is of a newer version or cannot be read.
    """
    path = f"{place.uri}/{MANIFEST}"
    try:
        raw = place.open().read(MANIFEST)
    except FileNotFoundError as error:
        raise DataIntegrityError(
            f"{place.uri} holds no finished set of images ({MANIFEST} is missing); make it again"
        ) from error
    content = parse_json(raw, path, REMEDY)
    version = content.get("version", MANIFEST_VERSION) if isinstance(content, dict) else MANIFEST_VERSION
    if version != MANIFEST_VERSION:
        raise DataIntegrityError(
            f"{path} has version {version}, this program reads version {MANIFEST_VERSION}; upgrade proxyrob"
        )
    try:
        manifest = ShardManifest.model_validate(content)
    except ValidationError as error:
        raise DataIntegrityError(
            f"{path} cannot be read as a manifest of version {MANIFEST_VERSION} ({first_fault(error)}); {REMEDY}"
        ) from error
    return manifest


def shard_file(place: DataPlace, entry: ShardEntry) -> Path:
    """A local file with the shard's content, its hash checked.

    Raises ``DataIntegrityError`` naming the shard and its expected hash.
    """
    remedy = f"delete {place.uri}/{entry.key} and run again: only this shard is made anew"
    return place.file(entry.key, sha256=entry.sha256, size_bytes=entry.size_bytes, remedy=remedy)


def read_shard(
    place: DataPlace, entry: ShardEntry, image_shape: tuple[int, int, int], *, mapped: bool = False
) -> UInt8[np.ndarray, "n h w c"]:
    """One shard's images, its hash, type and shape checked; ``mapped`` leaves them on disk.

    Raises ``DataIntegrityError`` naming the shard and its expected hash.
    """
    path = shard_file(place, entry)
    images = read_array(path, mapped)
    if images.dtype != np.uint8 or images.shape != (entry.num_images, *image_shape) or not images.flags.c_contiguous:
        raise DataIntegrityError(
            f"{path}: expected uint8 images of shape {(entry.num_images, *image_shape)}, got {images.dtype} {images.shape}"
        )
    return images
