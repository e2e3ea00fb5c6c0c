"""Sources: every kind is read, verified and cut alike, and bad input is refused before anything is trained."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from proxyrob.config import (
    Cifar2Source,
    Cifar10Source,
    Cifar100Source,
    DigitsSource,
    FolderSource,
    NpzSource,
    ParquetSource,
    SourceConfig,
    load_config,
)
from proxyrob.config.source import FileSource, OwnSource
from proxyrob.errors import DataIntegrityError
from proxyrob.source import Split, pin_source, prepare_source, read_split, source_report
from proxyrob.storage import Stage
from tests.conftest import MakeStage
from tests.image_files import CLASSES, write_folder, write_parquet
from tests.prepared import NAMES, prepare, rows_of, splits_of, with_label
from tests.toys import Recorder, damage, files_below, tiny_split

TRAIN = tiny_split(45, classes=3, shape=(4, 4, 3))
TEST = tiny_split(12, classes=3, shape=(4, 4, 3), seed=1)


def _write(kind: str, folder: Path, train: Split = TRAIN, test: Split = TEST) -> dict[str, str]:
    """Files of a kind of source, and the settings that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in (("train", train), ("test", test)):
        match kind:
            case "parquet":
                write_parquet(folder / f"{name}.parquet", split)
            case "folder":
                write_folder(folder / name, split)
            case _:
                np.savez(folder / f"{name}.npz", image=split.stored, label=split.labels)
    suffix = {"parquet": ".parquet", "folder": "", "npz": ".npz"}[kind]
    return {"train": str(folder / f"train{suffix}"), "test": str(folder / f"test{suffix}")}


def _source(kind: str, folder: Path, train: Split = TRAIN, test: Split = TEST, **values: Any) -> OwnSource:
    given = {"kind": kind, "name": "toys", "num_validation": 6, **_write(kind, folder, train, test), **values}
    return TypeAdapter(OwnSource).validate_python(given)


every_kind = pytest.mark.parametrize("kind", ["parquet", "folder", "npz"])


# The user's own images


@every_kind
def test_every_kind_gives_the_same_splits(kind: str, tmp_path: Path, make_stage: MakeStage) -> None:
    """The same images are the same source, whatever files they lie in; nothing is lost and nothing is in two splits."""
    stage = make_stage("source")
    report = prepare(_source(kind, tmp_path / "data"), stage)
    splits = splits_of(stage)
    assert report == source_report(stage)
    assert (report.num_train, report.num_validation, report.num_test) == (39, 6, 12)
    assert (report.image_shape, report.train_class_counts) == ((3, 4, 4), (13, 13, 13))
    assert report.class_names == (("0", "1", "2") if kind == "npz" else CLASSES)
    assert sorted(splits["train"] + splits["validation"]) == sorted(rows_of(TRAIN))
    assert sorted(splits["test"]) == sorted(rows_of(TEST))


@every_kind
def test_the_cut_depends_on_the_images_alone(kind: str, tmp_path: Path, make_stage: MakeStage) -> None:
    """Neither the seed nor the order of the rows nor the kind of file decides which images are for validation."""
    order = np.random.default_rng(0).permutation(45)
    shuffled = Split(TRAIN.stored[order], TRAIN.labels[order])
    first, second, third = (make_stage("source", k=k) for k in range(3))
    prepare(_source(kind, tmp_path / "a"), first, seed=0)
    prepare(_source(kind, tmp_path / "a"), second, seed=1)
    prepare(_source("npz", tmp_path / "b", shuffled), third)
    assert source_report(first).content_sha256 == source_report(second).content_sha256
    assert sorted(splits_of(third)["validation"]) == sorted(splits_of(first)["validation"])


def test_fewer_images_are_a_part_of_more(tmp_path: Path, make_stage: MakeStage) -> None:
    """``num_train`` takes a balanced part of the training images in their order, ``num_test`` the first test images."""
    whole, part = make_stage("source", k=0), make_stage("source", k=1)
    prepare(_source("npz", tmp_path), whole)
    report = prepare(_source("npz", tmp_path, num_train=12, num_test=5), part)
    assert (report.num_train, report.num_test, report.train_class_counts) == (12, 5, (4, 4, 4))
    all_rows, rows = splits_of(whole), splits_of(part)
    assert rows["validation"] == all_rows["validation"]
    assert rows["train"] == [row for row in all_rows["train"] if row in rows["train"]]
    assert rows["test"] == all_rows["test"][:5]


def test_validation_is_stratified(tmp_path: Path, make_stage: MakeStage) -> None:
    """An unbalanced data set is cut in proportion: 30, 12 and 3 of 45 give 10, 4 and 1 of 15."""
    labels = np.repeat(np.arange(3), (30, 12, 3))
    stage = make_stage("source")
    prepare(_source("npz", tmp_path, Split(TRAIN.stored, labels), num_validation=15), stage)
    assert np.bincount(read_split(stage, "validation").labels).tolist() == [10, 4, 1]


def test_names_of_classes_can_be_given(tmp_path: Path, make_stage: MakeStage) -> None:
    """They name the labels of an ``.npz``, or replace the names of the files."""
    for k, kind in enumerate(("npz", "parquet")):
        config = _source(kind, tmp_path, class_names=("a", "b", "c"))
        assert prepare(config, make_stage("source", k=k)).class_names == ("a", "b", "c")


@pytest.mark.parametrize(("kind", "suffix"), [("parquet", ".parquet"), ("folder", "")])
def test_channels_can_be_chosen(kind: str, suffix: str, tmp_path: Path, make_stage: MakeStage) -> None:
    """Colour images are read as grey ones where the configuration says so."""
    report = prepare(_source(kind, tmp_path, channels=1), make_stage("source", suffix=suffix))
    assert report.image_shape == (1, 4, 4)


def test_a_finished_source_is_not_read_again(tmp_path: Path, make_stage: MakeStage) -> None:
    """A second call does no work, and scratch files are gone."""
    stage, recorder = make_stage("source"), Recorder()
    config = _source("npz", tmp_path / "data")
    report = prepare(config, stage, on_progress=recorder)
    assert recorder.told == [(45, 57), (57, 57)]
    assert prepare(config, stage, on_progress=recorder) == report
    assert len(recorder.told) == 2
    parts = {f"{name}-{part}.npy" for name in NAMES for part in ("images", "labels")}
    assert files_below(stage.folder) == parts | {"stage.json"}


# Bad input


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (TRAIN, with_label(TEST, 7, 3), r"test\.npz: row 7 has label 3, expected 0 to 2"),
        (with_label(TRAIN, 9, -1), TEST, r"train\.npz: .*row 9 has label -1"),
        (with_label(TRAIN, 40, 10**12), TEST, r"train\.npz: row 40 has label 1000000000000, expected 0 to 44"),
        (TRAIN, tiny_split(12, classes=3), r"has images of 4×4×3, .*test\.npz of 4×4×1 \(height×width×channels\)"),
        (TRAIN, tiny_split(12, classes=3, shape=(8, 8, 3)), r"has images of 4×4×3, .*test\.npz of 8×8×3"),
        (with_label(TRAIN, 0, 5), TEST, "the training split has no image of class 3, 4"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(
    train: Split, test: Split, message: str, tmp_path: Path, make_stage: MakeStage
) -> None:
    """A label outside the classes, another size or other channels: refused with file and row, and nothing is finished."""
    stage = make_stage("source")
    with pytest.raises(DataIntegrityError, match=message):
        prepare(_source("npz", tmp_path, train, test), stage)
    assert stage.record() is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_validation": 45}, r"expected source\.num_validation \+ source\.num_train of at most 45, .*got 45 \+ at least 1"),
        ({"num_train": 40}, r"of at most 45, the number of training images, got 6 \+ 40"),
        ({"num_test": 13}, r"expected source\.num_test of at most 12, the number of test images, got 13"),
        ({"class_names": ("a", "b")}, r"row 2 has label 2, expected 0 to 1"),
    ],
)
def test_more_than_there_is_is_refused(values: dict[str, Any], message: str, tmp_path: Path, make_stage: MakeStage) -> None:
    """Sizes beyond the data, and fewer names than classes, are refused with the setting."""
    with pytest.raises(ValueError, match=message):
        prepare(_source("npz", tmp_path, **values), make_stage("source"))


def test_names_that_do_not_fit_those_of_the_files_are_refused(tmp_path: Path, make_stage: MakeStage) -> None:
    """Another number of names than the files have, and test images of other classes, are refused with both lists."""
    with pytest.raises(DataIntegrityError, match=r"source\.class_names has 2 names, but .* has the classes cat, dog, fox"):
        prepare(_source("parquet", tmp_path, class_names=("a", "b")), make_stage("source"))
    config = _source("folder", tmp_path)
    (tmp_path / "test" / "fox").rename(tmp_path / "test" / "owl")
    with pytest.raises(DataIntegrityError, match=r"has the classes cat, dog, fox, .*test has cat, dog, owl; training and test"):
        prepare(config, make_stage("source"))


def test_images_without_labels_are_no_source(tmp_path: Path, make_stage: MakeStage) -> None:
    """A source is labelled."""
    config = _source("npz", tmp_path)
    np.savez(tmp_path / "test.npz", image=TEST.stored)
    with pytest.raises(DataIntegrityError, match=r"test\.npz has no labels; a source needs one for each image"):
        prepare(config, make_stage("source"))


def test_a_source_that_changes_after_it_was_pinned_is_refused(tmp_path: Path, make_stage: MakeStage) -> None:
    """What is read is what the digest says: altered files are refused, and so are files without a fingerprint."""
    config = _source("npz", tmp_path)
    pinned = pin_source(config)
    with pytest.raises(ValueError, match=r"source\.sha256 is not filled in"):
        prepare_source(config, seed=0, stage=make_stage("source"), downloads=tmp_path)
    damage(tmp_path / "train.npz")
    with pytest.raises(DataIntegrityError, match=r"not those that source\.sha256 names"):
        prepare_source(pinned, seed=0, stage=make_stage("source"), downloads=tmp_path)


# Configurations


def test_every_kind_of_source_is_tried() -> None:
    """A new kind has to be added to the tests of this file or of ``test_cifar.py``."""
    kinds = {"digits", "cifar10", "cifar100", "cifar2", "parquet", "folder", "npz"}
    assert set(TypeAdapter(SourceConfig).json_schema()["discriminator"]["mapping"]) == kinds


def test_the_digits_are_prepared_like_any_source(digits: Stage, make_stage: MakeStage) -> None:
    """Through the common entry the digits are what they are through their own."""
    report = prepare(DigitsSource(num_train=60, num_validation=30, num_test=60), make_stage("source", kind="digits"))
    assert report == source_report(digits)


@pytest.mark.parametrize(
    ("config", "dataset", "train", "test"),
    [
        (DigitsSource(), "digits", 200, 797),
        (Cifar10Source(), "cifar10", 48_976, 10_000),
        (Cifar100Source(num_train=500), "cifar100", 500, 10_000),
        (Cifar2Source(num_validation=1000, num_test=64), "cifar2", 9000, 64),
        (Cifar10Source(path="a"), "cifar10", None, None),
        (NpzSource(name="toys", train="a", test="b"), "toys", None, None),
        (FolderSource(name="toys", train="a", test="b", num_train=5, num_test=4), "toys", 5, 4),
        (ParquetSource(name="toys", train="a", test="b", num_test=4), "toys", None, 4),
    ],
)
def test_sizes_are_known_where_they_can_be(config: FileSource | DigitsSource, dataset: str, train: int, test: int) -> None:
    """A whole download and numbers that were asked for are known before anything is read."""
    assert (config.dataset, config.known_train, config.known_test) == (dataset, train, test)


@pytest.mark.parametrize("values", [{"train_file": "a"}, {"test_file": "a"}, {"sha256": "0" * 64}])
def test_a_setting_without_path_is_refused(values: dict[str, str]) -> None:
    """Settings of files have no effect on a download."""
    with pytest.raises(ValidationError, match=f"{next(iter(values))} has no effect without path; give the folder, or leave"):
        Cifar10Source(**values)  # pyright: ignore[reportArgumentType]  # one of several fields


@pytest.mark.parametrize("name", ["Toys", "", "my_set", "-toys"])
def test_a_name_must_do_for_a_model(name: str) -> None:
    """Models are named after the data set, so its name is made of lower-case letters, digits and dashes."""
    with pytest.raises(ValidationError, match="name"):
        NpzSource(name=name, train="a", test="b")


def test_every_field_but_the_places_is_identity() -> None:
    """Sizes, names, channels and fingerprint decide the result; where the files lie does not."""
    base = ParquetSource(name="toys", train="a", test="b")
    places = [base.replace(train="c"), base.replace(test="c")]
    others = [
        base.replace(name="other"),
        base.replace(num_train=5),
        base.replace(num_validation=5),
        base.replace(num_test=5),
        base.replace(class_names=("a", "b")),
        base.replace(channels=1),
        base.replace(sha256="0" * 64),
        FolderSource(name="toys", train="a", test="b"),
    ]
    assert {config.digest() for config in places} == {base.digest()}
    assert len({config.digest() for config in [base, *others]}) == len(others) + 1
    cifar = Cifar10Source(path="a", sha256="0" * 64)
    assert cifar.digest() == cifar.replace(path="b", train_file="c", test_file="d").digest()
    assert cifar.digest() != Cifar100Source(path="a", sha256="0" * 64).digest()


def test_a_source_is_chosen_on_the_command_line() -> None:
    """Another kind takes over what was changed, has its own defaults for the rest, and its own keys are known."""
    changes = ["source.kind=cifar2", "source.path=data", "source.num_test=500", "certify.num_images=500"]
    config = load_config("digits", changes)
    assert config.source == Cifar2Source(path="data", num_test=500)
    with pytest.raises(ValueError, match=r"certify\.num_images is 501, more than the 500 images of the test split"):
        load_config("digits", [*changes, "certify.num_images=501"])
    with pytest.raises(ValueError, match=r"^source\.train_fil: there is no such key; did you mean 'train_file'"):
        load_config("digits", [*changes, "source.train_fil=x"])


def test_certificates_of_an_unknown_number_of_images_are_allowed() -> None:
    """Where the number of test images is in the files alone, the configuration cannot refuse."""
    tree = load_config("digits", ["certify.num_images=5000", "source.kind=cifar10", "source.path=a", "source.num_test=null"])
    assert tree.certify.num_images == 5000
