"""Published sets: imported exactly, in flat memory, once; recognised by their hash; adopted only where they fit."""

import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from proxyrob.config import JitterProxy, MixtureProxy, PublishedProxy, WeightedProxy
from proxyrob.errors import DataIntegrityError
from proxyrob.label import LabelReport, adopt_labels
from proxyrob.mix import SyntheticSet, SyntheticView
from proxyrob.proxy import ImportReport, SamplesReport, adopt_samples, import_samples, pin_proxy
from proxyrob.proxy.published import ORIGIN
from proxyrob.rng import Streams
from proxyrob.shards import GIVEN_LABELS, MANIFEST, read_manifest, read_side_index, read_side_table
from proxyrob.source import Split
from proxyrob.storage import DataPlace, Stage
from tests.conftest import MakeStage
from tests.toys import Killer, Recorder, StopHereError, files_below, read_images, tiny_split, write_images, write_source

COUNT, SHAPE = 23, (4, 4, 3)
SPLIT = tiny_split(COUNT, shape=SHAPE)
CLASSES = tuple("abcdefghij")
BY_CLASS = np.argsort(SPLIT.labels, kind="stable")
"""The order of images in folders: class by class."""


def _png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="png")
    return content.getvalue()


def _write_bin(folder: Path) -> dict[str, Any]:
    (folder / "set.bin").write_bytes(SPLIT.stored.tobytes())
    np.save(folder / "labels.npy", SPLIT.labels.astype(np.int16))
    return {"path": folder / "set.bin", "labels": folder / "labels.npy", "image_shape": SHAPE, "num_classes": 10}


def _write_npz(folder: Path) -> dict[str, Any]:
    np.savez(folder / "set.npz", image=SPLIT.stored, label=SPLIT.labels)
    return {"path": folder / "set.npz"}


def _write_parquet(folder: Path) -> dict[str, Any]:
    images = [{"bytes": _png(image), "path": None} for image in SPLIT.stored]
    pq.write_table(pa.table({"image": images, "label": SPLIT.labels}), folder / "set.parquet", row_group_size=7)
    return {"path": folder / "set.parquet"}


def _write_folder(folder: Path) -> dict[str, Any]:
    for row, (image, label) in enumerate(zip(SPLIT.stored, SPLIT.labels, strict=True)):
        (folder / "set" / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        (folder / "set" / CLASSES[label] / f"{row:03d}.png").write_bytes(_png(image))
    return {"path": folder / "set"}


LAYOUTS = {"bin": _write_bin, "npz": _write_npz, "parquet": _write_parquet, "folder": _write_folder}


@pytest.fixture
def place(tmp_path: Path) -> DataPlace:
    """Where sets are imported to."""
    return DataPlace.of(tmp_path / "sets" / "others")


def _import(given: dict[str, Any], place: DataPlace, **more: Any) -> ImportReport:
    return import_samples(**{"shard_size": 5, **given, **more}, place=place)


def _given(place: DataPlace) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """All side tables of an import, and the classes."""
    beside = place.below(f"labels/{GIVEN_LABELS}")
    index = read_side_index(beside, read_manifest(place))
    return pd.concat([read_side_table(beside, table) for table in index.tables], ignore_index=True), index.class_names


def _content(place: DataPlace) -> dict[str, bytes]:
    return {name: (Path(place.uri) / name).read_bytes() for name in files_below(Path(place.uri))}


# Import


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_labels_and_ids_are_those_of_the_file(layout: str, tmp_path: Path, place: DataPlace) -> None:
    """From every layout, each image is imported bit for bit in the file's order, with its label, numbered from 0."""
    report = _import(LAYOUTS[layout](tmp_path), place)
    order = BY_CLASS if layout == "folder" else np.arange(COUNT)
    table, names = _given(place)
    assert np.array_equal(read_images(place), SPLIT.stored[order])
    assert table.label.tolist() == SPLIT.labels[order].tolist()
    assert table.id.tolist() == list(range(COUNT))
    assert table.kept.all()
    assert names == (CLASSES if layout == "folder" else tuple("0123456789"))
    manifest = read_manifest(place)
    assert [shard.num_images for shard in manifest.shards] == [5, 5, 5, 5, 3]
    assert (report.num_images, report.num_shards, report.image_shape) == (COUNT, 5, SHAPE)
    assert report.class_counts == tuple(np.bincount(SPLIT.labels).tolist())
    assert (report.constant_images, report.sha256) == (0, manifest.sha256)


def test_images_without_labels_have_no_side_tables(tmp_path: Path, place: DataPlace) -> None:
    """A set without labels is imported for our labelers to vote on; constant images are counted."""
    stored = SPLIT.stored.copy()
    stored[[2, 11]] = 7
    np.save(tmp_path / "set.npy", stored)
    report = _import({"path": tmp_path / "set.npy"}, place)
    assert (report.class_counts, report.constant_images) == ((), 2)
    assert not (Path(place.uri) / "labels").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("killed_at", [0, 5, 20])
def test_an_interrupted_import_goes_on(layout: str, killed_at: int, tmp_path: Path, place: DataPlace) -> None:
    """Killed before any or after some shards and called again, an import ends with the files of one that was not."""
    given, whole = LAYOUTS[layout](tmp_path), DataPlace.of(tmp_path / "whole")
    expected = _import(given, whole)
    with pytest.raises(StopHereError):
        _import(given, place, on_progress=Killer(lambda done: done == killed_at))
    assert MANIFEST not in files_below(Path(place.uri))
    recorder = Recorder()
    assert _import(given, place, on_progress=recorder) == expected
    assert recorder.told[0] == (killed_at, COUNT), "what was imported is not read again"
    assert recorder.told[-1] == (COUNT, COUNT)
    assert _content(place) == _content(whole)


@pytest.mark.parametrize("killed_at", [5, 10, 20])
def test_constant_images_are_counted_across_an_interruption(killed_at: int, tmp_path: Path, place: DataPlace) -> None:
    """Those of the shards written before and of the shards written after are added."""
    stored = SPLIT.stored.copy()
    stored[[2, 11, 22]] = 7
    np.save(tmp_path / "set.npy", stored)
    with pytest.raises(StopHereError):
        _import({"path": tmp_path / "set.npy"}, place, on_progress=Killer(lambda done: done == killed_at))
    for _ in range(2):
        assert _import({"path": tmp_path / "set.npy"}, place).constant_images == 3


def test_importing_again_changes_nothing(tmp_path: Path, place: DataPlace) -> None:
    """A finished import answers with its report and writes nothing."""
    given = _write_npz(tmp_path)
    report, before = _import(given, place), _content(place)
    assert _import(given, place) == report
    assert _content(place) == before


def _other_size(given: dict[str, Any]) -> None:
    np.savez(given["path"], image=SPLIT.stored[:-1], label=SPLIT.labels[:-1])


def _other_content(given: dict[str, Any]) -> None:
    np.savez(given["path"], image=SPLIT.stored[::-1], label=SPLIT.labels)


@pytest.mark.parametrize(
    ("change", "different"),
    [
        (_other_size, "num_images"),
        (_other_content, "sha256_of_ends"),
        (lambda given: given.update(shard_size=6), "shard_size"),
        (lambda given: given.update(path=given["path"].rename(given["path"].with_name("renamed.npz"))), "from"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_another_file_is_not_imported_into_the_same_place(
    change: Callable[[dict[str, Any]], None], different: str, is_finished: bool, tmp_path: Path, place: DataPlace
) -> None:
    """A finished import and an interrupted one are not mixed with another file, or another cut: the difference is named."""
    given = _write_npz(tmp_path)
    if is_finished:
        _import(given, place)
    else:
        with pytest.raises(StopHereError):
            _import(given, place, on_progress=Killer(lambda done: done == 10))
    before = _content(place)
    change(given)
    text = rf"holds an import of set\.npz already, which differs in .*{different}.*; choose another name"
    with pytest.raises(DataIntegrityError, match=text):
        _import(given, place)
    assert _content(place) == before


@pytest.mark.parametrize(("label", "allowed"), [(10, "the 10 classes 0 to 9"), (300, "the 10 classes 0 to 9")])
def test_a_label_outside_the_classes_is_refused_with_its_row(
    label: int, allowed: str, tmp_path: Path, place: DataPlace
) -> None:
    """The first wrong row is named, counted from the beginning of the file, also after an interruption; no set is finished."""
    given = _write_bin(tmp_path)
    labels = SPLIT.labels.copy()
    labels[[12, 20]] = label
    np.save(given["labels"], labels)
    for _ in range(2):  # the second time it begins with the third shard
        with pytest.raises(DataIntegrityError, match=rf"labels\.npy, row 12: label {label} is outside {allowed}"):
            _import(given, place)
        assert {"shard-000000.npy", "shard-000001.npy"} <= files_below(Path(place.uri))
        assert MANIFEST not in files_below(Path(place.uri))
        assert "shard-000002.npy" not in files_below(Path(place.uri))


def test_a_negative_label_is_refused_with_its_row(tmp_path: Path, place: DataPlace) -> None:
    """-1, which often stands for «none», is no class."""
    given = _write_bin(tmp_path)
    np.save(given["labels"], np.where(np.arange(COUNT) == 17, -1, SPLIT.labels))
    with pytest.raises(DataIntegrityError, match=r"labels\.npy.* row 17.* label -1"):
        _import({**given, "num_classes": None}, place)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_shape": (5, 5, 3)}, r"has 1104 bytes, expected a multiple of 75"),
        ({"labels": None, "image_shape": (4, 4, 7)}, r"1 or 3 channels|multiple of"),
    ],
)
def test_what_the_header_tells_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path, place: DataPlace
) -> None:
    """A file of another size leaves no trace at the place."""
    with pytest.raises(DataIntegrityError, match=message):
        _import({**_write_bin(tmp_path), **changes}, place)
    assert not Path(place.uri).exists()


def test_labels_for_other_images_are_refused_before_anything_is_written(tmp_path: Path, place: DataPlace) -> None:
    """A file of labels that is one short is refused with both numbers."""
    given = _write_bin(tmp_path)
    np.save(given["labels"], SPLIT.labels[:-1])
    with pytest.raises(DataIntegrityError, match=r"has 22 labels, but .* has 23 images"):
        _import(given, place)
    assert not Path(place.uri).exists()


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """Four times as many images take no more memory to import: a block and a shard, not the set."""

    def peak(count: int) -> int:
        path, place = tmp_path / f"{count}.bin", DataPlace.of(tmp_path / str(count))
        with path.open("wb") as file:
            for block in range(count // 1000):
                file.write(tiny_split(1000, shape=(32, 32, 3), seed=block).stored.tobytes())
        np.save(tmp_path / f"{count}.npy", np.arange(count) % 10)
        tracemalloc.start()
        try:
            import_samples(path, place, labels=tmp_path / f"{count}.npy", num_classes=10, shard_size=500)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(3000), peak(12_000)
    assert large < 1.1 * small
    assert large < 12_000 * 32 * 32 * 3 / 2


# Pinning


def test_pinning_fills_in_what_a_set_is(place: DataPlace, tmp_path: Path) -> None:
    """Hash and number of images come from the set's manifest, also inside a mixture; other proxies stay as they are."""
    manifest = write_images(place, SPLIT.stored)
    sets = DataPlace.of(tmp_path / "sets")
    expected = PublishedProxy(name="others", sha256=manifest.sha256, num_images=COUNT)
    assert pin_proxy(PublishedProxy(name="others"), sets) == expected
    assert pin_proxy(expected, sets) == expected
    parts = [WeightedProxy(weight=2.0, proxy=proxy) for proxy in (PublishedProxy(name="others"), JitterProxy())]
    pinned = MixtureProxy(parts=(parts[0].replace(proxy=expected), parts[1]))
    assert pin_proxy(MixtureProxy(parts=tuple(parts)), sets) == pinned
    assert pin_proxy(JitterProxy(), sets) == JitterProxy()
    assert pin_proxy(None, sets) is None


def test_another_set_than_configured_is_refused(place: DataPlace, tmp_path: Path) -> None:
    """A configuration that says which images it means does not run on others: both hashes are named."""
    manifest = write_images(place, SPLIT.stored)
    text = rf"the set 'others' is not the one .*: expected sha256 {'0' * 64}, got {manifest.sha256}; import that one, or take"
    with pytest.raises(DataIntegrityError, match=text):
        pin_proxy(PublishedProxy(name="others", sha256="0" * 64), DataPlace.of(tmp_path / "sets"))


def test_a_set_that_is_missing_or_unfinished_is_refused(tmp_path: Path, place: DataPlace) -> None:
    """What was never imported, or not to the end, is answered with the command that imports it."""
    sets = DataPlace.of(tmp_path / "sets")
    with pytest.raises(DataIntegrityError, match=r"proxyrob import FILE --name others"):
        pin_proxy(PublishedProxy(name="others"), sets)
    with pytest.raises(StopHereError):
        _import(_write_npz(tmp_path), place, on_progress=Killer(lambda done: done == 20))
    with pytest.raises(DataIntegrityError, match=r"manifest\.json is missing.*proxyrob import FILE --name others"):
        pin_proxy(PublishedProxy(name="others"), sets)


# Adoption


@pytest.fixture
def source(make_stage: MakeStage) -> Stage:
    """A source of images of the same size and classes."""
    stage = make_stage("source")
    write_source(stage, tiny_split(60, shape=SHAPE, seed=8), test=tiny_split(20, shape=SHAPE, seed=9))
    return stage


@pytest.fixture
def imported(tmp_path: Path, place: DataPlace) -> PublishedProxy:
    """An imported set, pinned."""
    report = _import(_write_npz(tmp_path), place)
    return PublishedProxy(name="others", sha256=report.sha256, num_images=report.num_images)


def test_samples_are_adopted_without_a_copy(
    imported: PublishedProxy, source: Stage, place: DataPlace, make_stage: MakeStage
) -> None:
    """The stage has a report and no files; nothing at the set's place changes; the second call does nothing."""
    stage, before, recorder = make_stage("samples"), _content(place), Recorder()
    report = adopt_samples(imported, source=source, images=place, stage=stage)
    expected = {"num_images": COUNT, "num_shards": 5, "image_shape": (3, 4, 4), "constant_images": 0, "sha256": imported.sha256}
    assert report == SamplesReport.model_validate(expected)
    assert files_below(stage.folder) == {"stage.json"}
    assert _content(place) == before
    assert adopt_samples(imported, source=source, images=place, stage=stage, on_progress=recorder) == report
    assert recorder.told == []


def test_another_set_is_not_adopted(imported: PublishedProxy, source: Stage, place: DataPlace, make_stage: MakeStage) -> None:
    """A set that was replaced since the configuration was pinned is refused."""
    with pytest.raises(DataIntegrityError, match="is another set than configured"):
        adopt_samples(imported.replace(sha256="0" * 64), source=source, images=place, stage=make_stage("samples"))


def test_images_of_another_size_are_not_adopted(imported: PublishedProxy, place: DataPlace, make_stage: MakeStage) -> None:
    """Both shapes are named, and nothing is finished."""
    source, stage = make_stage("grey"), make_stage("samples")
    write_source(source, tiny_split(60))
    with pytest.raises(DataIntegrityError, match=r"has images of shape \(4, 4, 3\), the real images have \(4, 4, 1\)"):
        adopt_samples(imported, source=source, images=place, stage=stage)
    assert stage.record() is None


@pytest.mark.usefixtures("imported")
def test_given_labels_are_adopted_and_trained_on(source: Stage, place: DataPlace, make_stage: MakeStage) -> None:
    """The labels of the file become side tables of the set, all kept, and a view of them has every image with its label."""
    stage, labels = make_stage("labels"), place.below("labels/adopted")
    given = {"source": source, "images": place, "given": place.below("labels/given"), "labels": labels, "stage": stage}
    report = adopt_labels(**given)
    assert (report.num_images, report.num_kept, report.num_disagree, report.num_leaked) == (COUNT, COUNT, 0, 0)
    assert report.kept_per_class == tuple(np.bincount(SPLIT.labels).tolist())
    assert report == stage.finished(LabelReport) == adopt_labels(**given)
    view = SyntheticView(SyntheticSet(place, labels), streams=Streams(0))
    images, classes, ids = view.take(0, COUNT)
    assert np.array_equal(images, SPLIT.stored[ids])
    assert np.array_equal(classes, SPLIT.labels[ids])


@pytest.mark.usefixtures("imported")
def test_labels_of_other_classes_are_not_adopted(place: DataPlace, make_stage: MakeStage) -> None:
    """Ten classes do not fit a source of three: refused with both numbers and the remedy."""
    source = make_stage("source")
    few = tiny_split(60, classes=3, shape=SHAPE, seed=8)
    write_source(source, few, test=Split(few.stored[:9], few.labels[:9]))
    given = place.below("labels/given")
    with pytest.raises(DataIntegrityError, match="has labels of 10 classes, the real images have 3; import the set with the"):
        adopt_labels(source=source, images=place, given=given, labels=place.below("labels/adopted"), stage=make_stage("labels"))


def test_an_unlabelled_set_has_no_labels_to_adopt(
    source: Stage, tmp_path: Path, place: DataPlace, make_stage: MakeStage
) -> None:
    """Given labels that were never given are missed by name."""
    np.save(tmp_path / "set.npy", SPLIT.stored)
    _import({"path": tmp_path / "set.npy"}, place)
    with pytest.raises(DataIntegrityError, match=r"labels/given holds no finished labels"):
        adopt_labels(
            source=source,
            images=place,
            given=place.below("labels/given"),
            labels=place.below("labels/adopted"),
            stage=make_stage("labels"),
        )


def test_an_import_says_where_it_came_from(tmp_path: Path, place: DataPlace) -> None:
    """Beside the shards lies which file they are of; the manifest carries it on."""
    _import(_write_npz(tmp_path), place)
    assert ORIGIN in files_below(Path(place.uri))
    manifest = read_manifest(place)
    assert (manifest.generator, manifest.sampler["from"]) == ("published: set.npz", "set.npz")
