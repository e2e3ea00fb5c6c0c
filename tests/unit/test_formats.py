"""Images in files: every layout reads alike, from any row, in flat memory, and what does not fit is refused by name."""

import io
import pickle
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from proxyrob.errors import DataIntegrityError
from proxyrob.source import ImageFile, Split, open_images
from proxyrob.source.arrays import BLOCK_ROWS
from proxyrob.source.encoded import decode_image
from tests.image_files import CLASSES, png, write_folder, write_parquet
from tests.toys import tiny_split

CIFAR = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10"
SHAPE = (4, 5, 3)


def _split(count: int = 11, shape: tuple[int, int, int] = SHAPE) -> Split:
    """Random images in the order of their classes, as a folder has them."""
    split = tiny_split(count, classes=3, shape=shape)
    return Split(split.stored, np.sort(split.labels))


def _bin(folder: Path, split: Split) -> ImageFile:
    np.save(folder / "labels.npy", split.labels)
    (folder / "images.bin").write_bytes(split.stored.tobytes())
    return open_images(folder / "images.bin", labels=folder / "labels.npy", image_shape=SHAPE)


def _npy(folder: Path, split: Split) -> ImageFile:
    np.save(folder / "labels.npy", split.labels.astype(">i4"))
    np.save(folder / "images.npy", split.stored)
    return open_images(folder / "images.npy", labels=folder / "labels.npy")


def _npz(folder: Path, split: Split) -> ImageFile:
    np.savez(folder / "a.npz", image=split.stored, label=split.labels)
    return open_images(folder / "a.npz")


def _npz_deflated(folder: Path, split: Split) -> ImageFile:
    np.savez_compressed(folder / "a.npz", labels=split.labels.astype(np.uint8), images=split.stored, other=np.ones(3))
    return open_images(folder / "a.npz")


def _parquet(folder: Path, split: Split) -> ImageFile:
    return open_images(write_parquet(folder / "a.parquet", split, row_group_size=3))


def _parquet_folder(folder: Path, split: Split) -> ImageFile:
    write_parquet(folder / "train-00000-of-00002.parquet", split.first(4), row_group_size=3)
    write_parquet(folder / "train-00001-of-00002.parquet", Split(split.stored[4:], split.labels[4:]))
    return open_images(folder)


def _class_folders(folder: Path, split: Split) -> ImageFile:
    write_folder(folder / "images", split)
    (folder / "images" / "notes.txt").write_text("no image")
    (folder / "images" / ".hidden").mkdir()
    return open_images(folder / "images")


def _flat_folder(folder: Path, split: Split) -> ImageFile:
    np.save(folder / "labels.npy", split.labels)
    return open_images(write_folder(folder / "images", split, None), labels=folder / "labels.npy")


LAYOUTS = [_bin, _npy, _npz, _npz_deflated, _parquet, _parquet_folder, _class_folders, _flat_folder]
every_layout = pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__.strip("_"))
Write = Callable[[Path, Split], ImageFile]


def read_all(file: ImageFile, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels from a row on."""
    blocks = list(file.read(start))
    labels = [block[1] for block in blocks if block[1] is not None]
    return np.concatenate([block[0] for block in blocks]), np.concatenate(labels)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven images come in blocks of four, so that every test crosses blocks."""
    monkeypatch.setattr("proxyrob.source.arrays.BLOCK_ROWS", 4)


@pytest.fixture
def full_blocks(_small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as large as in a real run."""
    monkeypatch.setattr("proxyrob.source.arrays.BLOCK_ROWS", BLOCK_ROWS)


# What is read


@every_layout
def test_every_layout_gives_back_what_was_written(write: Write, tmp_path: Path) -> None:
    """Images, labels, their number and shape are the same whatever the file."""
    split = _split()
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
    split = _split()
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
        list(write(tmp_path, _split()).read(start))


@every_layout
def test_blocks_are_bounded(write: Write, tmp_path: Path) -> None:
    """No block has more rows than it may, and none is empty."""
    assert [len(images) for images, _ in write(tmp_path, _split()).read()] == [4, 4, 3]


def test_class_names_come_from_folders_and_metadata(tmp_path: Path) -> None:
    """Folders and the hub's metadata name the classes; plain arrays and parquet without metadata do not."""
    assert _class_folders(tmp_path / "a", _split()).class_names == CLASSES
    assert _parquet_folder(tmp_path / "b", _split()).class_names == CLASSES
    assert open_images(write_parquet(tmp_path / "c.parquet", _split(), None)).class_names is None
    assert _npz(tmp_path, _split()).class_names is None


def test_labels_are_optional(tmp_path: Path) -> None:
    """Images without labels are read without them."""
    split = _split()
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
    table = pa.table({"img": [png(image) for image in _split().stored], "coarse_label": [0] * 11, "fine_label": range(11)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_all(open_images(tmp_path / "a.parquet"))[1].tolist() == list(range(11))


def test_folders_are_read_in_the_order_of_torchvision(tmp_path: Path) -> None:
    """Classes, nested files and their labels follow each other as in ``ImageFolder``."""
    split = _split()
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
    split = _split()
    np.savez(tmp_path / "a.npz", image=split.stored, label=split.labels)
    np.save(tmp_path / "b.npy", split.stored)
    write_parquet(tmp_path / "c.parquet", split)
    for name in ("a.npz", "b.npy", "c.parquet"):
        file = open_images((tmp_path / name).rename(tmp_path / name[0]))
        assert np.array_equal(np.concatenate([images for images, _ in file.read()]), split.stored)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_pattern_names_one_split_of_a_folder(tmp_path: Path, compressed: bool) -> None:
    """``train-*.parquet`` leaves the test files of the same folder out; the folder itself is ambiguous."""
    split = _split()
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


# Decoding


def _encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


GREY = np.array([[0, 128], [200, 255]], np.uint8)
COLOUR = np.array([[[10, 20, 30], [40, 50, 60]], [[255, 0, 0], [0, 0, 255]]], np.uint8)
SOLID = np.full((2, 2), 255, np.uint8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        pytest.param(Image.fromarray(GREY), GREY[..., None], id="grey"),
        pytest.param(Image.fromarray(COLOUR), COLOUR, id="colour"),
        pytest.param(Image.fromarray(GREY.astype(np.uint16) * 256 + 77), GREY[..., None], id="grey-16-bit"),
        pytest.param(Image.fromarray(np.dstack([COLOUR, GREY])), COLOUR, id="transparent-colour"),
        pytest.param(Image.fromarray(np.dstack([GREY, SOLID])), GREY[..., None], id="transparent-grey"),
        pytest.param(Image.fromarray(COLOUR).quantize(4), COLOUR, id="palette"),
        pytest.param(Image.fromarray(GREY > 127), np.uint8(255) * (GREY > 127)[..., None], id="one-bit"),
    ],
)
def test_every_kind_of_image_becomes_grey_or_colour(image: Image.Image, expected: np.ndarray) -> None:
    """Sixteen bits keep the upper eight, transparency is dropped, palettes become colour."""
    assert np.array_equal(decode_image(_encoded(image), "a"), expected)


def test_transparency_in_a_palette_is_dropped() -> None:
    """A transparent colour of a palette is that colour, without a warning."""
    image = Image.fromarray(COLOUR).quantize(4)
    image.info["transparency"] = bytes([0, 255, 255, 255])
    assert np.array_equal(decode_image(_encoded(image), "a"), COLOUR)


def test_the_shape_decides_the_channels(tmp_path: Path) -> None:
    """Asked for three channels a grey image becomes colour, asked for one a colour image becomes grey."""
    (tmp_path / "0.png").write_bytes(_encoded(Image.fromarray(GREY)))
    (tmp_path / "1.png").write_bytes(_encoded(Image.fromarray(COLOUR)))
    colour = np.concatenate([images for images, _ in open_images(tmp_path, image_shape=(2, 2, 3)).read()])
    assert np.array_equal(colour, np.stack([np.dstack([GREY] * 3), COLOUR]))
    grey = np.concatenate([images for images, _ in open_images(tmp_path, image_shape=(2, 2, 1)).read()])
    assert np.array_equal(grey[0, ..., 0], GREY)
    assert grey.shape == (2, 2, 2, 1)


def test_grey_among_colour_becomes_colour_and_colour_among_grey_is_refused(tmp_path: Path) -> None:
    """The first image decides; no image loses its colours unasked."""
    (tmp_path / "0.png").write_bytes(_encoded(Image.fromarray(COLOUR)))
    (tmp_path / "1.png").write_bytes(_encoded(Image.fromarray(GREY)))
    images = np.concatenate([images for images, _ in open_images(tmp_path).read()])
    assert np.array_equal(images[1], np.dstack([GREY] * 3))
    (tmp_path / "2.png").write_bytes(_encoded(Image.fromarray(COLOUR)))
    (tmp_path / "0.png").unlink()
    with pytest.raises(DataIntegrityError, match=r"2\.png \(row 1 of .*is a colour image, but the first one is grey; say how"):
        list(open_images(tmp_path).read())


def test_levels_that_are_no_pixels_are_refused() -> None:
    """Floating-point levels have no range that could be known."""
    image = Image.fromarray(np.zeros((2, 2), np.float32))
    with pytest.raises(DataIntegrityError, match="here has floating-point levels, expected integers"):
        decode_image(_encoded(image, "TIFF"), "here")


# What is refused when the file is opened


def _save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]  # numpy's own keyword allow_pickle is not among them
    return path


IMAGES = _split().stored
LABELS = _split().labels


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"image": IMAGES.astype(np.float32) / 255, "label": LABELS},
            r"image\.npy holds float32, expected uint8 from 0 to 255",
        ),
        ({"image": IMAGES.astype(np.int64)}, "holds int64, expected uint8"),
        ({"image": IMAGES.transpose(0, 3, 1, 2).copy()}, r"shape \(11, 3, 4, 5\), expected .* 1 or 3 .*transpose\(images"),
        ({"image": np.zeros((11, 4, 5, 4), np.uint8)}, r"shape \(11, 4, 5, 4\), expected \(images, height, width, channels\)"),
        ({"image": np.zeros((11, 60), np.uint8)}, r"shape \(11, 60\), expected \(images"),
        ({"image": np.asfortranarray(IMAGES)}, "stored in Fortran's order.*save numpy.ascontiguousarray"),
        ({"image": IMAGES, "label": LABELS[:-1]}, r"label\.npy has 10 labels, but .*image\.npy has 11 images; one of the two"),
        ({"image": IMAGES, "label": LABELS.astype(np.float64)}, r"holds float64 of shape \(11,\), expected one integer label"),
        ({"image": IMAGES, "label": np.eye(11, dtype=np.int64)}, r"holds int64 of shape \(11, 11\), expected one integer"),
        ({"x": IMAGES, "label": LABELS}, r"exactly one array of images called image or images, found x\.npy, label\.npy"),
        ({"image": IMAGES, "images": IMAGES}, "exactly one array of images"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    """Type, shape, order, number and names are checked before anything is read; the message names the array."""
    with pytest.raises(DataIntegrityError, match=message):
        open_images(_save(tmp_path / "a.npz", **arrays))


class _Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "unpickled")


@pytest.mark.parametrize("name", ["image", "label"])
def test_pickled_objects_are_refused_and_never_unpickled(name: str, tmp_path: Path) -> None:
    """An array of objects is refused with the reason, and the code inside it does not run."""
    trap = tmp_path / "trap"
    arrays = {"image": IMAGES, "label": LABELS} | {name: np.array([_Trap(trap)] * 11, object)}
    path = _save(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataIntegrityError, match=rf"{name}\.npy holds pickled Python objects; .*never unpickled\. Save plain"):
        open_images(path)
    assert not trap.exists()
    np.save(tmp_path / "labels.npy", arrays[name], allow_pickle=True)
    with pytest.raises(DataIntegrityError, match=r"labels\.npy holds pickled Python objects"):
        open_images(_save(tmp_path / "b.npz", image=IMAGES), labels=tmp_path / "labels.npy")
    assert not trap.exists()
    assert np.load(path, allow_pickle=True)[name].shape == (11,)
    assert trap.read_text() == "unpickled"  # the trap does spring for whoever unpickles


def test_a_bare_pickle_is_no_array(tmp_path: Path) -> None:
    """A pickle that calls itself ``.npy`` is refused by its first bytes."""
    (tmp_path / "a.npy").write_bytes(pickle.dumps(IMAGES))
    with pytest.raises(DataIntegrityError, match=r"a\.npy is not a whole \.npy array"):
        open_images(tmp_path / "a.npy")


@every_layout
def test_a_file_cut_off_is_refused(write: Write, tmp_path: Path) -> None:
    """Of whatever layout, a file that lost its last byte is refused by name, when it is opened or when it is read."""
    write(tmp_path, _split())
    last = max(path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("labels.npy", "notes.txt"))
    last.write_bytes(last.read_bytes()[: -40 if last.suffix == ".png" else -1])
    given: dict[str, Any] = {"labels": tmp_path / "labels.npy"} if (tmp_path / "labels.npy").exists() else {}
    given |= {"image_shape": SHAPE} if last.suffix == ".bin" else {}
    path = last if last.parent == tmp_path else tmp_path / "images"
    with pytest.raises(DataIntegrityError, match=re.escape(last.name)):
        list(open_images(path, **given).read())


def test_a_bin_of_another_size_is_refused_with_what_is_left_over(tmp_path: Path) -> None:
    """The size has to be a multiple of an image; the row and the bytes left over are named."""
    (tmp_path / "a.bin").write_bytes(bytes(3072 * 2 + 5))
    with pytest.raises(
        DataIntegrityError, match=r"a\.bin has 6149 bytes, expected a multiple of 3072 .*after row 2 there are 5"
    ):
        open_images(tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(DataIntegrityError, match="has 0 bytes"):
        open_images(tmp_path / "a.bin")


def test_a_bin_in_the_layout_of_cifar_is_recognised(tmp_path: Path) -> None:
    """CIFAR's own binary files have a label before every image: the message says how to read them."""
    (tmp_path / "a.bin").write_bytes(bytes(3073 * 10))
    with pytest.raises(DataIntegrityError, match=r"CIFAR's own layout.*source\.kind=cifar10"):
        open_images(tmp_path / "a.bin")


def test_labels_of_another_length_are_refused(tmp_path: Path) -> None:
    """A .bin that lost whole images no longer has as many as labels; both files are named."""
    np.save(tmp_path / "labels.npy", LABELS)
    (tmp_path / "a.bin").write_bytes(IMAGES[:-1].tobytes())
    with pytest.raises(
        DataIntegrityError, match=r"labels\.npy has 11 labels, but .*a\.bin has 10 images; one of the two is cut"
    ):
        open_images(tmp_path / "a.bin", labels=tmp_path / "labels.npy", image_shape=SHAPE)


@pytest.mark.parametrize("write", [_npz, _parquet, _class_folders])
def test_labels_are_not_given_twice(write: Write, tmp_path: Path) -> None:
    """Labels beside images that have their own would leave open which count."""
    write(tmp_path, _split())
    np.save(tmp_path / "labels.npy", LABELS)
    path = next(path for path in (tmp_path / "a.npz", tmp_path / "a.parquet", tmp_path / "images") if path.exists())
    with pytest.raises(ValueError, match=r"labels.*; give it without .*labels\.npy"):
        open_images(path, labels=tmp_path / "labels.npy")


@pytest.mark.parametrize("write", [_npy, _npz, _parquet, _class_folders])
@pytest.mark.parametrize("shape", [(5, 4, 3), (8, 8, 3)])
def test_images_of_another_shape_than_expected_are_refused(write: Write, shape: tuple[int, int, int], tmp_path: Path) -> None:
    """Who expects a shape gets that shape or an error, before anything is read."""
    write(tmp_path, _split())
    names = ("images.npy", "a.npz", "a.parquet", "images")
    path = next(tmp_path / name for name in names if (tmp_path / name).exists())
    with pytest.raises(DataIntegrityError, match=rf"4×5.*expected {shape[0]}×{shape[1]}"):
        open_images(path, image_shape=shape)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    """A missing file, an unknown layout and a folder without images are refused with what is expected."""
    with pytest.raises(FileNotFoundError, match=r"there is nothing at .*a\.npz; give a file or folder of images: \.bin"):
        open_images(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match=r"there is no parquet file at .*train-\*"):
        open_images(tmp_path / "train-*.parquet")
    (tmp_path / "a.txt").write_text("images")
    with pytest.raises(ValueError, match=r"a\.txt is none of the known layouts"):
        open_images(tmp_path / "a.txt")
    with pytest.raises(DataIntegrityError, match=r"holds no image .*and no \.parquet file"):
        open_images(tmp_path)
    _save(tmp_path / "b.npz", image=IMAGES)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*labels\.npy"):
        open_images(tmp_path / "b.npz", labels=tmp_path / "labels.npy")


def test_folders_that_can_be_read_two_ways_are_refused(tmp_path: Path) -> None:
    """Images beside class folders, and a class without images, are mistakes."""
    write_folder(tmp_path / "a", _split())
    (tmp_path / "a" / "loose.png").write_bytes(png(IMAGES[0]))
    with pytest.raises(DataIntegrityError, match=r"has folders \(cat, …\) and images \(loose\.png, …\) beside each other"):
        open_images(tmp_path / "a")
    write_folder(tmp_path / "b", _split())
    (tmp_path / "b" / "owl").mkdir()
    with pytest.raises(DataIntegrityError, match=r"owl holds no image .*fill or remove that class"):
        open_images(tmp_path / "b")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"picture": [b"a"], "label": [0]},
            r"has the columns picture \(binary\), label \(int64\); expected images in a column",
        ),
        ({"img": ["a.png"], "label": [0]}, r"img \(string\)"),
        ({"img": [png(IMAGES[0])], "label": ["cat"]}, "column label is string, expected integers"),
        ({"img": [{"bytes": None, "path": "a.png"}], "label": [0]}, r"a\.parquet: row 0 has no bytes of an image; embed"),
        ({"img": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "holds no rows"),
    ],
)
def test_tables_of_another_layout_are_refused(table: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Columns, their types and missing images are named."""
    columns = pa.table(table)
    if columns.schema.field(0).type == pa.struct({"bytes": pa.null(), "path": pa.string()}):
        columns = columns.cast(
            pa.schema([("img", pa.struct({"bytes": pa.binary(), "path": pa.string()})), ("label", pa.int64())])
        )
    pq.write_table(columns, tmp_path / "a.parquet")
    with pytest.raises(DataIntegrityError, match=message):
        open_images(tmp_path / "a.parquet")


def test_files_of_different_sets_are_not_joined(tmp_path: Path) -> None:
    """Parquet files of one folder must agree on columns and classes."""
    write_parquet(tmp_path / "a.parquet", _split())
    write_parquet(tmp_path / "b.parquet", _split(), ("owl", "dog", "fox"))
    with pytest.raises(DataIntegrityError, match=r"b\.parquet has other columns or classes than .*a\.parquet"):
        open_images(tmp_path)


# What is refused when a row is read


@pytest.mark.parametrize("write", [_bin, _npz, _parquet])
def test_a_negative_label_is_refused_with_its_row(write: Write, tmp_path: Path) -> None:
    """−1 for «unknown» is no label; the row is named, also when reading starts behind the beginning."""
    labels = LABELS.copy()
    labels[9] = -1
    file = write(tmp_path, Split(IMAGES, labels))
    for start in (0, 6):
        with pytest.raises(DataIntegrityError, match=r"row 9 has label -1, expected 0"):
            list(file.read(start))


def test_a_label_outside_the_named_classes_is_refused(tmp_path: Path) -> None:
    """Three classes are named, so 3 is no label."""
    labels = LABELS.copy()
    labels[7] = 3
    file = open_images(write_parquet(tmp_path / "a.parquet", Split(IMAGES, labels), row_group_size=2))
    with pytest.raises(DataIntegrityError, match=r"a\.parquet: row 7 has label 3, expected 0 to 2"):
        list(file.read())


def test_a_missing_label_is_refused(tmp_path: Path) -> None:
    """A null in the column of labels is named."""
    table = pa.table({"img": [png(image) for image in IMAGES[:2]], "label": pa.array([0, None], pa.int64())})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataIntegrityError, match=r"row 1 has label None"):
        list(open_images(tmp_path / "a.parquet").read())


def test_an_image_of_another_size_is_refused_with_its_row(tmp_path: Path) -> None:
    """In folders and parquet each image has a size of its own; the first that differs is named."""
    wrong = png(np.zeros((5, 5, 3), np.uint8))
    write_folder(tmp_path / "images", _split())
    (tmp_path / "images" / "dog" / "9999.png").write_bytes(wrong)
    with pytest.raises(DataIntegrityError, match=r"9999\.png \(row 8 of .*\) has 5×5 pixels, expected 4×5 .*resize or remove"):
        list(open_images(tmp_path / "images").read())
    pq.write_table(pa.table({"img": [png(IMAGES[0]), wrong]}), tmp_path / "a.parquet")
    with pytest.raises(DataIntegrityError, match=r"a\.parquet: row 1 has 5×5 pixels, expected 4×5"):
        list(open_images(tmp_path / "a.parquet").read())


@pytest.mark.parametrize("content", [b"", b"no image", png(IMAGES[0])[:-30]])
def test_an_image_that_cannot_be_decoded_is_named(content: bytes, tmp_path: Path) -> None:
    """An empty, foreign or truncated image is named with its row."""
    pq.write_table(pa.table({"img": [png(IMAGES[0]), content]}), tmp_path / "a.parquet")
    with pytest.raises(DataIntegrityError, match=r"a\.parquet: row 1 cannot be decoded"):
        list(open_images(tmp_path / "a.parquet").read())


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_zip_is_found_while_it_is_read(compressed: bool, tmp_path: Path) -> None:
    """A flipped byte inside an ``.npz`` is found by its checksum."""
    path = tmp_path / "a.npz"
    (np.savez_compressed if compressed else np.savez)(path, image=IMAGES)
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("image.npy").header_offset + 300
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataIntegrityError, match=r"a\.npz.*cannot be read as a zip file .*copy or download it again"):
        list(open_images(path).read())


def test_a_file_that_shrinks_while_it_is_read_is_found(tmp_path: Path) -> None:
    """A file replaced by a shorter one after it was opened is not taken for whole."""
    path = tmp_path / "a.bin"
    path.write_bytes(IMAGES.tobytes())
    file = open_images(path, image_shape=SHAPE)
    path.write_bytes(IMAGES[:6].tobytes())
    with pytest.raises(DataIntegrityError, match=r"a\.bin ends after row 6 of 11"):
        list(file.read())


# Real data


@pytest.mark.usefixtures("full_blocks")
@pytest.mark.skipif(not CIFAR.is_dir(), reason=f"needs CIFAR-10 in the hub's layout at {CIFAR}")
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
