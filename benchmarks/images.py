"""The images that ``benchmarks/data.py`` reads, and a writer of them for each reader's format.

Image i is noise with i itself written into the middle of its three channels, where neither a shift by four pixels nor
mirroring can remove it; its label follows from i. So every batch of every reader tells which images it holds.

Only numpy is imported for all: a writer may run in the environment of a peer, which has no more.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

SHAPE = (32, 32, 3)
IMAGE_BYTES = 3072
NUM_CLASSES = 10
CHUNK = 10_000  # images written at a time, in a shard and in a tar file
NOISES = 1000
NOISE = np.random.default_rng(0).integers(0, 256, (NOISES, *SHAPE), np.uint8)


def labels_of(ids: np.ndarray) -> np.ndarray:
    """The label of each image."""
    return ids // 3 % NUM_CLASSES


def images_of(ids: np.ndarray) -> np.ndarray:
    """The images themselves."""
    images = NOISE[ids % NOISES]
    for channel in range(3):
        images[:, 11:21, 11:21, channel] = (ids >> 8 * channel & 255)[:, None, None]
    return images


def ids_in(images: np.ndarray) -> np.ndarray:
    """Which images these are, moved or not."""
    middle = images[:, 16, 16] if images.dtype == np.uint8 else np.rint(images[:, :, 16, 16] * 255)
    return middle.astype(np.int64) @ np.array([1, 1 << 8, 1 << 16])


# ---- the same images in every reader's format


def _chunks(count: int) -> Iterator[np.ndarray]:
    for start in range(0, count, CHUNK):
        yield np.arange(start, min(start + CHUNK, count))


def write_shards(place: str, count: int) -> None:
    """Into a folder or a prefix of S3."""
    import pandas as pd

    from proxyrob.shards import describe_shards, shard_name, write_manifest, write_shard, write_side_index, write_side_table
    from proxyrob.storage import DataPlace

    images, labels, shards = DataPlace(place), DataPlace(place).below("labels"), []
    for number, ids in enumerate(_chunks(count)):
        name = shard_name(number)
        write_shard(images, name, images_of(ids))
        write_side_table(labels, name, pd.DataFrame({"id": ids, "label": labels_of(ids), "kept": True, "reason": ""}))
        shards.append((name, int(ids[0]), len(ids)))
    manifest = describe_shards(
        images, shards=shards, image_shape=SHAPE, generator="noise", source_sha256="none", sampler={}, seed=0
    )
    write_manifest(images, manifest)
    write_side_index(labels, manifest, {}, [str(label) for label in range(NUM_CLASSES)])


def write_flat(place: str, count: int) -> None:
    folder = Path(place)
    with (folder / "images.bin").open("wb") as file:
        for ids in _chunks(count):
            file.write(images_of(ids).tobytes())
    np.save(folder / "labels.npy", labels_of(np.arange(count)))


def write_npz(place: str, count: int) -> None:
    images = np.empty((count, *SHAPE), np.uint8)
    for ids in _chunks(count):
        images[ids[0] : ids[-1] + 1] = images_of(ids)
    np.savez(Path(place) / "images.npz", image=images, label=labels_of(np.arange(count)))


def write_mds(place: str, count: int) -> None:
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]  (in an environment of its own)

    columns = {"image": "ndarray:uint8:32,32,3", "label": "int"}
    with MDSWriter(out=f"{place}/mds", columns=columns) as writer:
        for ids in _chunks(count):
            for image, label in zip(images_of(ids), labels_of(ids).tolist(), strict=True):
                writer.write({"image": image, "label": label})


def write_tar(place: str, count: int) -> None:
    from webdataset.writer import TarWriter

    folder = Path(place) / "tar"
    folder.mkdir()
    for number, ids in enumerate(_chunks(count)):
        with TarWriter(str(folder / f"{number:06d}.tar")) as writer:
            for i, image, label in zip(ids.tolist(), images_of(ids), labels_of(ids).tolist(), strict=True):
                writer.write({"__key__": f"{i:09d}", "bin": image.tobytes(), "cls": label})


WRITERS = {"shards": write_shards, "flat": write_flat, "npz": write_npz, "mds": write_mds, "tar": write_tar}
