"""The CIFAR data sets: counted and named, and the same wherever they come from."""

import hashlib
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from proxyrob.config import Cifar2Source, Cifar10Source, Cifar100Source
from proxyrob.errors import DataIntegrityError, SourceUnavailable
from proxyrob.source import Split, pin_source, prepare_source, read_split, source_report
from proxyrob.source.cifar import CIFAR10_NAMES, CIFAR100_NAMES, check_counts, select_classes, split_of
from tests.conftest import MakeStage
from tests.hostile import MARKER, pickled
from tests.image_files import CIFAR, CLASSES, needs_cifar, write_parquet
from tests.prepared import prepare, rows_of, splits_of, with_label
from tests.toys import damage, tiny_split


def _cifar(count: int, *, classes: int = 10, seed: int = 0) -> Split:
    return tiny_split(count, classes=classes, shape=(32, 32, 3), seed=seed)


@pytest.fixture
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10 has 50 training and 20 test images."""
    monkeypatch.setattr("proxyrob.source.cifar.NUM_TRAIN", 50)
    monkeypatch.setattr("proxyrob.source.cifar.NUM_TEST", 20)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder of the hub with 50 training images in two files and 20 test images."""
    folder = tmp_path / "hub"
    train = _cifar(50)
    write_parquet(folder / "train-00000-of-00002.parquet", train.first(30), None)
    write_parquet(folder / "train-00001-of-00002.parquet", Split(train.stored[30:], train.labels[30:]), None)
    write_parquet(folder / "test-00000-of-00001.parquet", _cifar(20, seed=1), None)
    return folder


def test_cifar10_is_read_from_the_hub(hub: Path, make_stage: MakeStage) -> None:
    """All shards together, the known names, in the data set's own order; fewer images than the whole set are counted."""
    stage = make_stage("source")
    report = prepare(Cifar10Source(path=str(hub), num_validation=10), stage)
    assert (report.num_train, report.num_validation, report.num_test) == (40, 10, 20)
    assert (report.class_names, report.image_shape, report.train_class_counts) == (CIFAR10_NAMES, (3, 32, 32), (4,) * 10)
    rows = splits_of(stage)
    assert rows["test"] == rows_of(_cifar(20, seed=1))
    assert rows["train"] == [row for row in rows_of(_cifar(50)) if row not in rows["validation"]]


def test_cifar2_is_automobiles_against_trucks(hub: Path, make_stage: MakeStage) -> None:
    """Labels 1 and 9 of CIFAR-10 become 0 and 1; all others are left out."""
    stage = make_stage("source")
    report = prepare(Cifar2Source(path=str(hub), num_validation=2), stage)
    assert (report.class_names, report.num_train, report.num_validation, report.num_test) == (("automobile", "truck"), 8, 2, 4)
    test, whole = read_split(stage, "test"), _cifar(20, seed=1)
    assert test.labels.tolist() == [0, 1, 0, 1]
    assert np.array_equal(test.stored, whole.stored[[1, 9, 11, 19]])


def test_cifar100_has_its_hundred_names(tmp_path: Path, make_stage: MakeStage) -> None:
    """The fine classes, in the order of their labels."""
    assert (len(set(CIFAR100_NAMES)), sorted(CIFAR100_NAMES)) == (100, list(CIFAR100_NAMES))
    write_parquet(tmp_path / "train.parquet", _cifar(200, classes=100), None)
    write_parquet(tmp_path / "test.parquet", _cifar(100, classes=100, seed=1), None)
    report = prepare(Cifar100Source(path=str(tmp_path), num_validation=100), make_stage("source"))
    assert (report.class_names, report.train_class_counts) == (CIFAR100_NAMES, (1,) * 100)


def test_other_images_are_not_taken_for_cifar(hub: Path, make_stage: MakeStage) -> None:
    """A label that CIFAR-10 does not have and images of another size are refused with file and row."""
    train = with_label(_cifar(50), 41, 10)
    write_parquet(hub / "train-00001-of-00002.parquet", Split(train.stored[30:], train.labels[30:]), None)
    with pytest.raises(DataIntegrityError, match=r"train\*\.parquet: row 41 has label 10, expected 0 to 9"):
        prepare(Cifar10Source(path=str(hub), num_validation=10), make_stage("source"))
    write_parquet(hub / "test-00000-of-00001.parquet", tiny_split(20), None)
    with pytest.raises(DataIntegrityError, match=r"row 0 has 4×4 pixels, expected 32×32"):
        prepare(Cifar10Source(path=str(hub), num_validation=10), make_stage("source"))


@pytest.mark.usefixtures("small_cifar")
def test_a_whole_set_is_counted(hub: Path, make_stage: MakeStage) -> None:
    """As many images as the data set has must be as many of each class, and more there cannot be."""
    prepare(Cifar10Source(path=str(hub), num_validation=10), make_stage("source", k=0))
    write_parquet(hub / "test-00000-of-00001.parquet", with_label(_cifar(20, seed=1), 3, 4), None)
    with pytest.raises(
        DataIntegrityError, match=r"cifar10's test images are 20, but 1 of them have label 3, expected 2 of each"
    ):
        prepare(Cifar10Source(path=str(hub), num_validation=10), make_stage("source", k=1))
    with pytest.raises(DataIntegrityError, match="images are 21, but the data set has 20; give one file"):
        check_counts(_cifar(21), 20, 10, "images")


class _Data:
    """What torchvision's data sets hold."""

    def __init__(self, split: Split, classes: tuple[str, ...] = CIFAR10_NAMES) -> None:
        self.data = split.stored
        self.targets: list[int] = split.labels.tolist()
        self.classes = list(classes)


def test_a_data_set_of_torchvision_becomes_a_split() -> None:
    """Images and labels are taken over as they are; another shape or other classes are refused."""
    split = split_of(_Data(_cifar(20)), CIFAR10_NAMES)
    assert rows_of(split) == rows_of(_cifar(20))
    with pytest.raises(
        DataIntegrityError, match=r"uint8 of shape \(20, 4, 4, 1\), 20 labels and 10 classes; install torchvision"
    ):
        split_of(_Data(tiny_split(20)), CIFAR10_NAMES)
    with pytest.raises(DataIntegrityError, match=r"the 10 known classes, .* and 3 classes"):
        split_of(_Data(_cifar(20), CLASSES), CIFAR10_NAMES)


def _batches(folder: Path) -> Callable[[str, dict[str, Any]], list[str]]:
    def write(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]  # noqa: S324  (what torchvision compares)

    return write


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder into which torchvision has downloaded a CIFAR-10 of 50 training and 20 test images."""
    folder = tmp_path / "downloads" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    write = _batches(folder)

    def batch(split: Split) -> dict[str, Any]:
        return {"data": split.stored.transpose(0, 3, 1, 2).reshape(len(split), -1), "labels": split.labels.tolist()}

    train = _cifar(50)
    parts = [Split(train.stored[k : k + 10], train.labels[k : k + 10]) for k in range(0, 50, 10)]
    monkeypatch.setattr(CIFAR10, "train_list", [write(f"data_batch_{k + 1}", batch(part)) for k, part in enumerate(parts)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(_cifar(20, seed=1)))])
    name, md5 = write("batches.meta", {"label_names": list(CIFAR10_NAMES)})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    monkeypatch.setattr(CIFAR10, "url", "file:///nowhere/cifar-10-python.tar.gz")
    return tmp_path / "downloads"


@pytest.mark.usefixtures("small_cifar")
@pytest.mark.parametrize("kind", [Cifar10Source, Cifar2Source])
def test_a_download_gives_the_same_images_as_the_hub(
    kind: type[Cifar10Source | Cifar2Source], downloaded: Path, hub: Path, make_stage: MakeStage
) -> None:
    """Wherever CIFAR comes from, images, order and cut are the same."""
    first, second = make_stage("source", k=0), make_stage("source", k=1)
    prepare_source(kind(num_validation=4), seed=0, stage=first, downloads=downloaded)
    prepare_source(pin_source(kind(num_validation=4, path=str(hub))), seed=0, stage=second, downloads=downloaded)
    assert source_report(first) == source_report(second)


def test_a_download_that_is_not_whole_is_refused(downloaded: Path, make_stage: MakeStage) -> None:
    """A data set with fewer images than it has to have is refused."""
    with pytest.raises(DataIntegrityError, match="holds 50 images of cifar10, expected 50000; delete it"):
        prepare_source(Cifar10Source(), seed=0, stage=make_stage("source"), downloads=downloaded)


@pytest.mark.usefixtures("small_cifar")
def test_a_download_that_fails_says_what_to_do(downloaded: Path, make_stage: MakeStage) -> None:
    """A damaged batch is not taken: torchvision downloads again, and without a network the ways out are named."""
    damage(downloaded / CIFAR10.base_folder / "data_batch_3")
    message = (
        r"cifar10 could not be downloaded from file:///nowhere/.*; put cifar-10-python\.tar\.gz into .*source\.path=FOLDER"
    )
    with pytest.raises(SourceUnavailable, match=message):
        prepare_source(Cifar10Source(num_validation=10), seed=0, stage=make_stage("source"), downloads=downloaded)


@pytest.mark.usefixtures("small_cifar")
def test_another_batch_is_not_unpickled(downloaded: Path, tmp_path: Path, make_stage: MakeStage) -> None:
    """torchvision's files are pickles: one without the published MD5 sum is never opened, nor is such an archive unpacked."""
    (downloaded / CIFAR10.base_folder / "data_batch_3").write_bytes(pickled(tmp_path))
    with tarfile.open(downloaded / CIFAR10.filename, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../../escaped"))
    with pytest.raises(SourceUnavailable, match=r"could not be downloaded .*source\.path=FOLDER"):
        prepare_source(Cifar10Source(num_validation=10), seed=0, stage=make_stage("source"), downloads=downloaded)
    assert not (tmp_path / MARKER).exists()
    assert not (tmp_path.parent / "escaped").exists()
    assert not (tmp_path / "escaped").exists()


def test_selected_classes_keep_their_order() -> None:
    """The second class that is asked for becomes label 1, wherever it lies."""
    split = select_classes(_cifar(20), [9, 1])
    assert split.labels.tolist() == [1, 0, 1, 0]
    assert np.array_equal(split.stored, _cifar(20).stored[[1, 9, 11, 19]])


@needs_cifar
def test_the_lossless_images_of_cifar10_are_a_source(make_stage: MakeStage) -> None:
    """5,085 training and 512 test images, cut by class; the folder holds several sets, so the files are named."""
    config = Cifar2Source(path=str(CIFAR), train_file="train-lossless-5085.parquet", test_file="test-lossless-0-512.parquet")
    report = prepare(config.replace(num_validation=100), make_stage("source"))
    assert (report.num_train, report.num_validation, report.train_class_counts) == (925, 100, (473, 452))
    with pytest.raises(ValueError, match=r"holds train-lossless-5085\.parquet, train\.parquet: say which"):
        pin_source(Cifar2Source(path=str(CIFAR)))
