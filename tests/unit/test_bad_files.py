"""Files of images that do not fit: each is refused by name, when it is opened or at the row that is wrong."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from proxyrob.errors import DataIntegrityError
from proxyrob.source import Split, open_images
from tests.image_files import (
    SHAPE,
    Write,
    as_bin,
    as_class_folders,
    as_npy,
    as_npz,
    as_parquet,
    every_layout,
    png,
    sorted_split,
    write_folder,
    write_parquet,
)

pytestmark = pytest.mark.usefixtures("small_blocks")


# What is refused when the file is opened


def _save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]  # numpy's own keyword allow_pickle is not among them
    return path


IMAGES = sorted_split().stored
LABELS = sorted_split().labels


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
    write(tmp_path, sorted_split())
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


@pytest.mark.parametrize("write", [as_npz, as_parquet, as_class_folders])
def test_labels_are_not_given_twice(write: Write, tmp_path: Path) -> None:
    """Labels beside images that have their own would leave open which count."""
    write(tmp_path, sorted_split())
    np.save(tmp_path / "labels.npy", LABELS)
    path = next(path for path in (tmp_path / "a.npz", tmp_path / "a.parquet", tmp_path / "images") if path.exists())
    with pytest.raises(ValueError, match=r"labels.*; give it without .*labels\.npy"):
        open_images(path, labels=tmp_path / "labels.npy")


@pytest.mark.parametrize("write", [as_npy, as_npz, as_parquet, as_class_folders])
@pytest.mark.parametrize("shape", [(5, 4, 3), (8, 8, 3)])
def test_images_of_another_shape_than_expected_are_refused(write: Write, shape: tuple[int, int, int], tmp_path: Path) -> None:
    """Who expects a shape gets that shape or an error, before anything is read."""
    write(tmp_path, sorted_split())
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
    write_folder(tmp_path / "a", sorted_split())
    (tmp_path / "a" / "loose.png").write_bytes(png(IMAGES[0]))
    with pytest.raises(DataIntegrityError, match=r"has folders \(cat, …\) and images \(loose\.png, …\) beside each other"):
        open_images(tmp_path / "a")
    write_folder(tmp_path / "b", sorted_split())
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
    write_parquet(tmp_path / "a.parquet", sorted_split())
    write_parquet(tmp_path / "b.parquet", sorted_split(), ("owl", "dog", "fox"))
    with pytest.raises(DataIntegrityError, match=r"b\.parquet has other columns or classes than .*a\.parquet"):
        open_images(tmp_path)


# What is refused when a row is read


@pytest.mark.parametrize("write", [as_bin, as_npz, as_parquet])
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
    write_folder(tmp_path / "images", sorted_split())
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
