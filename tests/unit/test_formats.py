"""Images in files: every layout reads alike, from any row, in flat memory."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torchvision.datasets import ImageFolder

from proxyrob.source import open_images
from proxyrob.source.arrays import BLOCK_ROWS
from tests.image_files import (
    CIFAR,
    CLASSES,
    SHAPE,
    Write,
    as_class_folders,
    as_npz,
    as_parquet_folder,
    every_layout,
    needs_cifar,
    png,
    read_all,
    sorted_split,
    write_folder,
    write_parquet,
)

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def full_blocks(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as large as in a real run."""
    monkeypatch.setattr("proxyrob.source.arrays.BLOCK_ROWS", BLOCK_ROWS)


@every_layout
def test_every_layout_gives_back_what_was_written(write: Write, tmp_path: Path) -> None:
    """Images, labels, their number and shape are the same whatever the file."""
    split = sorted_split()
    file = write(tmp_path, split)
    images, labels = read_all(file)
    assert (file.num_images, file.image_shape, file.has_labels) == (11, SHAPE, True)
    assert np.array_equal(images, split.stored)
    assert images.dtype == np.uint8
    assert np.array_equal(labels, split.labels)
    assert labels.dtype == np.int64


@every_layout
def test_reading_may_begin_at_any_row(write: Write, tmp_path: Path) -> None:
    """From row k on come the images from row k on, also from the first of a block and from behind the last."""
    split = sorted_split()
    file = write(tmp_path, split)
    for start in range(11):
        images, labels = read_all(file, start)
        assert np.array_equal(images, split.stored[start:])
        assert np.array_equal(labels, split.labels[start:])
    assert list(file.read(11)) == []


@every_layout
@pytest.mark.parametrize("start", [-1, 12])
def test_a_row_that_is_not_there_is_refused(write: Write, start: int, tmp_path: Path) -> None:
    """Reading cannot begin before the first row or behind the last."""
    with pytest.raises(ValueError, match=rf"expected to start at a row from 0 to 11, .*, got {start}"):
        list(write(tmp_path, sorted_split()).read(start))


@every_layout
def test_blocks_are_bounded(write: Write, tmp_path: Path) -> None:
    """No block has more rows than it may, and none is empty."""
    assert [len(images) for images, _ in write(tmp_path, sorted_split()).read()] == [4, 4, 3]


def test_class_names_come_from_folders_and_metadata(tmp_path: Path) -> None:
    """Folders and the hub's metadata name the classes; plain arrays and parquet without metadata do not."""
    assert as_class_folders(tmp_path / "a", sorted_split()).class_names == CLASSES
    assert as_parquet_folder(tmp_path / "b", sorted_split()).class_names == CLASSES
    assert open_images(write_parquet(tmp_path / "c.parquet", sorted_split(), None)).class_names is None
    assert as_npz(tmp_path, sorted_split()).class_names is None


def test_labels_are_optional(tmp_path: Path) -> None:
    """Images without labels are read without them."""
    split = sorted_split()
    np.savez(tmp_path / "a.npz", image=split.stored)
    (tmp_path / "a.bin").write_bytes(split.stored.tobytes())
    pq.write_table(pa.table({"image": [png(image) for image in split.stored]}), tmp_path / "a.parquet")
    write_folder(tmp_path / "images", split, None)
    for file in (
        open_images(tmp_path / "a.npz"),
        open_images(tmp_path / "a.bin", image_shape=SHAPE),
        open_images(tmp_path / "a.parquet"),
        open_images(tmp_path / "images"),
    ):
        blocks = list(file.read())
        assert not file.has_labels
        assert all(labels is None for _, labels in blocks)
        assert np.array_equal(np.concatenate([images for images, _ in blocks]), split.stored)


def test_fine_labels_are_labels(tmp_path: Path) -> None:
    """CIFAR-100 on the hub has two columns of labels; the fine ones count."""
    table = pa.table(
        {"img": [png(image) for image in sorted_split().stored], "coarse_label": [0] * 11, "fine_label": range(11)}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_all(open_images(tmp_path / "a.parquet"))[1].tolist() == list(range(11))


def test_folders_are_read_in_the_order_of_torchvision(tmp_path: Path) -> None:
    """Classes, nested files and their labels follow each other as in ``ImageFolder``."""
    split = sorted_split()
    write_folder(tmp_path, split, ("b", "a", "C"))
    (tmp_path / "a" / "deep").mkdir()
    (tmp_path / "a" / "deep" / "Z.PNG").write_bytes(png(split.stored[0]))
    file, peer = open_images(tmp_path), ImageFolder(tmp_path)
    images, labels = read_all(file)
    assert file.class_names == tuple(peer.classes)
    assert labels.tolist() == peer.targets
    assert all(np.array_equal(image, np.asarray(peer[row][0])) for row, image in enumerate(images))


def test_the_content_decides_where_the_suffix_says_nothing(tmp_path: Path) -> None:
    """A download without its suffix is recognised by its first bytes."""
    split = sorted_split()
    np.savez(tmp_path / "a.npz", image=split.stored, label=split.labels)
    np.save(tmp_path / "b.npy", split.stored)
    write_parquet(tmp_path / "c.parquet", split)
    for name in ("a.npz", "b.npy", "c.parquet"):
        file = open_images((tmp_path / name).rename(tmp_path / name[0]))
        assert np.array_equal(np.concatenate([images for images, _ in file.read()]), split.stored)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_pattern_names_one_split_of_a_folder(tmp_path: Path, compressed: bool) -> None:
    """``train-*.parquet`` leaves the test files of the same folder out; the folder itself is ambiguous."""
    split = sorted_split()
    options: dict[str, Any] = {"compression": "zstd"} if compressed else {}
    write_parquet(tmp_path / "train-00000-of-00001.parquet", split, **options)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", split.first(3), **options)
    assert open_images(tmp_path / "train-*.parquet").num_images == 11
    with pytest.raises(ValueError, match=r"holds several splits \(test-.*, train-.*\); give one"):
        open_images(tmp_path)


@pytest.mark.usefixtures("full_blocks")
@pytest.mark.parametrize("layout", ["bin", "npy", "npz", "npz-deflated"])
def test_memory_stays_flat(layout: str, tmp_path: Path) -> None:
    """48 MB of images are read in blocks of 4 MB: far less than the file is in memory at any time, from any row."""
    images = np.zeros((16_000, 32, 32, 3), np.uint8)
    path = tmp_path / layout.replace("-deflated", "").join(["a.", ""])
    match layout:
        case "bin":
            path.write_bytes(images.data)
        case "npy":
            np.save(path, images)
        case "npz":
            np.savez(path, image=images)
        case "npz-deflated":
            np.savez_compressed(path, image=images)
    del images
    tracemalloc.start()
    try:
        file = open_images(path)
        assert sum(len(block) for block, _ in file.read(3)) == 15_997
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("full_blocks")
def test_large_images_come_in_smaller_blocks(tmp_path: Path) -> None:
    """A block is bounded in bytes too: images of 3 MB come one by one."""
    (tmp_path / "a.bin").write_bytes(bytes(3 * 1024 * 1024 * 3))
    file = open_images(tmp_path / "a.bin", image_shape=(1024, 1024, 3))
    assert [len(images) for images, _ in file.read()] == [1, 1, 1]


@pytest.mark.usefixtures("full_blocks")
@needs_cifar
def test_cifar10_of_the_hub_is_read() -> None:
    """Lossless images are the first 1,017 of each of five batches: labels agree with the JPEGs, and nearly the pixels."""
    exact, lossy = open_images(CIFAR / "train-lossless-5085.parquet"), open_images(CIFAR / "train.parquet")
    assert (exact.num_images, lossy.num_images, exact.image_shape) == (5085, 50_000, (32, 32, 3))
    images, labels = next(exact.read(1017))
    others, other_labels = next(lossy.read(10_000))
    assert labels is not None
    assert other_labels is not None
    assert np.array_equal(labels[:1000], other_labels[:1000])
    assert np.abs(images[:1000].astype(int) - others[:1000]).mean() < 10
