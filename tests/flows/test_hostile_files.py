"""What is refused of files that somebody else may have written: in a store, in a data set, in a file that one is given.

Each case plants a file where an attacker would put it, and then opens the door that the program has for it, in a process of its
own that may take little memory. It is refused by an error of ours that names the file and says what to do; no code in the file
runs, no other file is opened, and little memory is taken.
"""

import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from flows.running.workers import run_in_child
from proxyrob.config import CnnModel, NaturalObjective, RobustTrainConfig, load_config
from proxyrob.config.proxy import PublishedProxy
from proxyrob.errors import CheckpointMismatch, DataIntegrityError
from proxyrob.evaluate import read_verdicts, replay_classifier
from proxyrob.export.measurement import require_own_folder
from proxyrob.label import adopt_labels
from proxyrob.models import adopt_model, identify_model, load_classifier, load_model
from proxyrob.proxy import import_samples, pin_proxy
from proxyrob.shards import INDEX, MANIFEST, read_manifest, read_side_index, read_side_table
from proxyrob.source import read_split, source_report
from proxyrob.storage import DataPlace, Stage
from proxyrob.storage.files import sha256_of, write_bytes
from proxyrob.train import train_classifier
from tests import hostile
from tests.hostile import MANY, MARKER, replace_file
from tests.image_files import png
from tests.somebody import adopted, write_onnx_file
from tests.toys import stage_in, tiny_split, write_set

SPARE_BYTES = 1 << 30
MOST_TAKEN_BYTES = 400 << 20


@dataclass(frozen=True)
class Given:
    """An empty folder, and finished stages to copy from."""

    folder: Path
    digits: Stage
    classifier: Stage
    evaluation: Stage

    def copy(self, stage: Stage) -> Stage:
        """A stage as it is, in a store of its own."""
        shutil.copytree(stage.folder, self.folder / stage.name)
        return replace(stage, folder=self.folder / stage.name)

    def new(self, name: str, **configuration: Any) -> Stage:
        """A stage that is not begun."""
        return stage_in(self.folder, name, **configuration)


Case = Callable[[Given], Iterator[None]]
CASES: dict[Case, str] = {}
"""What each plants and opens, and what is said; the first «yield» is where the file lies in its place."""


def refused(message: str) -> Callable[[Case], Case]:
    """The error of a case: a regular expression."""

    def add(case: Case) -> Case:
        CASES[case] = message
        return case

    return add


# A checkpoint of a training that is begun again


def _checkpoint(given: Given, content: bytes) -> Iterator[None]:
    stage = given.new("train")
    path = stage.scratch / "checkpoint-00000001.pt"
    path.write_bytes(content)
    known = {"size_bytes": len(content), "sha256": sha256_of(path)}
    record = {"format_version": 1, "stage": stage.name, "digest": stage.digest, "configuration": {}, "step": 1, **known}
    path.with_suffix(".json").write_text(json.dumps(record))
    yield
    training = RobustTrainConfig(objective=NaturalObjective(), steps=2, synthetic_fraction=0.0, gamma=1.0)
    nothing: dict[str, Any] = {"synthetic": (), "threat": None}
    train_classifier(CnnModel(widths=(4,)), training, source=given.digits, seed=0, stage=stage, **nothing)


CHECKPOINT = r"checkpoint-00000001\.pt does not hold the state of this configuration: "


@refused(CHECKPOINT + "it holds more than tensors and plain values; delete .* and run again")
def a_checkpoint_that_is_a_pickle(given: Given) -> Iterator[None]:
    return _checkpoint(given, hostile.pickled(given.folder))


@refused(CHECKPOINT + "it holds more than tensors and plain values; delete .* and run again")
def a_checkpoint_of_torch_with_a_pickle_inside(given: Given) -> Iterator[None]:
    return _checkpoint(given, hostile.torch_trap(given.folder))


@refused(CHECKPOINT + "it holds more than tensors and plain values; delete .* and run again")
def a_checkpoint_that_asks_for_memory(given: Given) -> Iterator[None]:
    return _checkpoint(given, hostile.torch_bomb())


@refused(CHECKPOINT + "its parts are compressed, which torch.save never does; delete")
def a_checkpoint_that_is_compressed(given: Given) -> Iterator[None]:
    return _checkpoint(given, hostile.torch_file({"parts": {}, "history": [0.0] * 1000}, compressed=True))


@refused(CHECKPOINT + r"a tensor of shape \(1000000000000,\) has fewer values in the file than it promises; delete")
def a_checkpoint_whose_tensor_is_not_there(given: Given) -> Iterator[None]:
    return _checkpoint(given, hostile.torch_view())


# A store of finished stages


@refused(r"stage\.json has 8589934592 bytes, and at most .* are read of such a file: it is damaged .*; delete it")
def a_record_of_gigabytes(given: Given) -> Iterator[None]:
    stage = given.copy(given.digits)
    with stage.record_path.open("r+b") as file:
        file.truncate(hostile.BIG)
    yield
    source_report(stage)


@refused(r"stage\.json cannot be read as format 1 of a stage record; delete the folder .* and run again")
def a_record_nested_without_end(given: Given) -> Iterator[None]:
    stage = given.copy(given.digits)
    write_bytes(stage.record_path, b'{"report": ' + b"[" * 1_000_000)
    yield
    source_report(stage)


@refused(r"stage\.json cannot be read as format 1 of a stage record; delete the folder")
def a_record_that_leads_elsewhere(given: Given) -> Iterator[None]:
    stage = given.copy(given.digits)
    record = json.loads(stage.record_path.read_bytes())
    record["files"].append({"name": "../../../etc/passwd", "size_bytes": 1, "sha256": "0" * 64})
    write_bytes(stage.record_path, json.dumps(record).encode())
    yield
    source_report(stage)


@refused(r"stage\.json says that there are 1000000000000 test images, more than their files hold; delete the folder")
def a_record_of_more_images_than_there_are(given: Given) -> Iterator[None]:
    stage = given.copy(given.digits)
    record = json.loads(stage.record_path.read_bytes())
    record["report"]["num_test"] = MANY
    write_bytes(stage.record_path, json.dumps(record).encode())
    yield
    source_report(stage)


@refused(r"test-images\.npy holds pickled Python objects; .* they are never unpickled")
def images_that_are_objects(given: Given) -> Iterator[None]:
    stage = given.copy(given.digits)
    replace_file(stage, "test-images.npy", hostile.objects(given.folder))
    yield
    read_split(stage, "test")


@refused(r"test-images\.npy has 128 bytes, but its header promises .* it is cut off or was put together wrongly: copy or make")
def images_that_are_not_there(given: Given) -> Iterator[None]:
    stage = given.copy(given.digits)
    replace_file(stage, "test-images.npy", hostile.npy((MANY, 8, 8, 1)))
    yield
    read_split(stage, "test")


@refused(r"test-labels\.npy is not a whole \.npy array \(its header has 4000000000 bytes, at most 10000 are read\); copy")
def labels_with_a_header_of_gigabytes(given: Given) -> Iterator[None]:
    stage = given.copy(given.digits)
    replace_file(stage, "test-labels.npy", hostile.npy((60,), "<i8", header_bytes=4_000_000_000) + bytes(480))
    yield
    read_split(stage, "test")


@refused(
    r"has test images of float64 \(60, 1000\) with labels of int64 \(60,\), expected uint8 \(60, 8, 8, 1\) and int64; delete"
)
def images_of_another_kind(given: Given) -> Iterator[None]:
    stage = given.copy(given.digits)
    replace_file(stage, "test-images.npy", hostile.npy((60, 1000), "<f8", content=bytes(480_000)))
    yield
    read_split(stage, "test")


@refused(r"model\.safetensors does not hold the network that .*model\.json describes: Error while deserializing header")
def weights_with_a_header_of_gigabytes(given: Given) -> Iterator[None]:
    stage = given.copy(given.classifier)
    replace_file(stage, "model.safetensors", (1 << 62).to_bytes(8, "little") + b"{}")
    yield
    load_classifier(stage)


@refused(r"model\.safetensors does not hold the network .*: network\..* has shape \[.*\] there, expected \[1000000, ")
def weights_of_a_larger_network(given: Given) -> Iterator[None]:
    stage = given.copy(given.classifier)
    card = json.loads((stage.folder / "model.json").read_bytes())
    card["model"]["widths"] = [10**6, 10**6]
    replace_file(stage, "model.json", json.dumps(card).encode())
    yield
    load_classifier(stage)


@refused(r"verdicts\.parquet holds \d+ bytes and promises \d{9,}, more than 500 times as many: .* save it without compression")
def verdicts_without_end(given: Given) -> Iterator[None]:
    stage = given.copy(given.evaluation)
    path = hostile.many_rows(given.folder / "rows.parquet", {"index": 1, "label": 1, "broken_by": "x"}, 20_000_000)
    replace_file(stage, "verdicts.parquet", path.read_bytes())
    yield
    read_verdicts(stage)


@refused(r"verdicts\.parquet holds \d+ bytes and promises 100000000000, more than 500 times as many")
def verdicts_with_a_long_text_in_every_row(given: Given) -> Iterator[None]:
    stage = given.copy(given.evaluation)
    path = hostile.many_rows(given.folder / "rows.parquet", {"index": 1, "broken_by": "x" * 100_000}, 1_000_000)
    replace_file(stage, "verdicts.parquet", path.read_bytes())
    yield
    read_verdicts(stage)


@refused(r"adversarial\.parquet has no header of proxyrob")
def adversarial_images_of_somebody_else(given: Given) -> Iterator[None]:
    stage = given.copy(given.evaluation)
    path = hostile.many_rows(given.folder / "rows.parquet", {"index": 1, "label": 1, "attack": "x", "pixels": 1.0}, 1000)
    replace_file(stage, "adversarial.parquet", path.read_bytes())
    yield
    replay_classifier(source=given.digits, evaluation=stage, model=given.classifier)


@refused(r"given\.json describes another model than the one that was given; delete the folder .* and run again")
def a_function_in_place_of_a_model(given: Given) -> Iterator[None]:
    stage = adopted(given.new, str(write_onnx_file(given.folder / "theirs.onnx")))
    card = {"kind": "function", "reference": "tests.hostile:call", "published_as": None, "sha256": "0" * 64}
    replace_file(stage, "given.json", json.dumps(card).encode())
    os.environ[MARKER] = str(given.folder)
    yield
    load_model(stage)


@refused(r"measurement\.json does not say which measurement it is of; measure again")
def a_measurement_without_a_name(given: Given) -> Iterator[None]:
    about = {
        "model": "",
        "note": "",
        "images": "",
        "shares": {},
        "radius": None,
        "conditions": [],
        "limits": [],
        "sanity": None,
    }
    (given.folder / "measurement.json").write_text(json.dumps({**about, "digests": {"measurements": "../../.."}}))
    yield
    require_own_folder(given.folder, "0" * 64)


# A data set: shards, labels, a published set


def _set(given: Given) -> Path:
    split = tiny_split(12)
    write_set(given.folder / "sets" / "theirs", split.stored, split.labels)
    return given.folder / "sets" / "theirs"


def _alter(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    write_bytes(path, json.dumps(content).encode())


@refused(
    r"manifest\.json cannot be read as a manifest of version 1 \(shards\.0\.name: String should match .*; put the former file"
)
def shards_that_lie_elsewhere(given: Given) -> Iterator[None]:
    folder = _set(given)
    _alter(folder / MANIFEST, lambda content: content["shards"][0].update(name="../../secret"))
    yield
    pin_proxy(PublishedProxy(name="theirs"), DataPlace.of(given.folder / "sets"))


@refused(
    r"manifest\.json cannot be read as .* \(shard-000000 is said to hold images 0 to 999999999999 in 208 bytes, which .*; put"
)
def shards_of_a_trillion_images(given: Given) -> Iterator[None]:
    folder = _set(given)
    _alter(folder / MANIFEST, lambda content: content["shards"][0].update(num_images=MANY))
    yield
    pin_proxy(PublishedProxy(name="theirs"), DataPlace.of(given.folder / "sets"))


@refused(
    r"manifest\.json cannot be read as .* \(expected images \(height, width, channels\) of at most 16777216 pixels, got .*; put"
)
def shards_of_enormous_images(given: Given) -> Iterator[None]:
    folder = _set(given)
    _alter(folder / MANIFEST, lambda content: content.update(image_shape=[10**6, 10**6, 1]))
    yield
    read_manifest(DataPlace.of(folder))


@refused(r"manifest\.json cannot be read as JSON \(recursion limit exceeded .*\); put the former file back, or delete it")
def a_manifest_nested_without_end(given: Given) -> Iterator[None]:
    folder = _set(given)
    write_bytes(folder / MANIFEST, b"[" * 1_000_000)
    yield
    read_manifest(DataPlace.of(folder))


@refused(r"index\.json cannot be read \(tables\.1\.name: String should match pattern .*\); delete it and label again")
def labels_that_lie_elsewhere(given: Given) -> Iterator[None]:
    folder = _set(given)
    _alter(folder / "labels" / "toy" / INDEX, lambda content: content["tables"][1].update(name="../../../secret"))
    yield
    read_side_index(DataPlace.of(folder / "labels" / "toy"), read_manifest(DataPlace.of(folder)))


@refused(r"index\.json names other tables than there are shards; delete it and label again")
def labels_of_a_trillion_images(given: Given) -> Iterator[None]:
    folder = _set(given)
    _alter(folder / "labels" / "toy" / INDEX, lambda content: content["tables"][0].update(num_images=MANY))
    yield
    adopt_labels(
        source=given.digits,
        images=DataPlace.of(folder),
        given=DataPlace.of(folder / "labels" / "toy"),
        labels=DataPlace.of(given.folder / "labels"),
        stage=given.new("labels"),
    )


@refused(
    r"shard-000000\.parquet holds \d+ bytes and promises \d{9,}, more than 500 times as many: .* save it without compression"
)
def a_table_of_labels_without_end(given: Given) -> Iterator[None]:
    folder = _set(given) / "labels" / "toy"
    columns = {"id": 0, "label": 1, "kept": True, "reason": "x"}
    path = hostile.many_rows(given.folder / "rows.parquet", columns, 20_000_000)
    path.replace(folder / "shard-000000.parquet")
    known = {"size_bytes": (folder / "shard-000000.parquet").stat().st_size}
    known |= {"sha256": sha256_of(folder / "shard-000000.parquet")}
    _alter(folder / INDEX, lambda content: content["tables"][0].update(known))
    yield
    index = read_side_index(DataPlace.of(folder), read_manifest(DataPlace.of(folder.parent.parent)))
    read_side_table(DataPlace.of(folder), index.tables[0])


# A file that one is given: proxyrob import


def _import(given: Given, path: Path) -> Iterator[None]:
    yield
    import_samples(path, DataPlace.of(given.folder / "imported"))


@refused(r"a\.npz: image\.npy is not a whole \.npy array \(its header has 104857600 bytes, at most 10000 are read\); copy")
def a_zip_with_a_header_of_megabytes(given: Given) -> Iterator[None]:
    return _import(given, hostile.long_npz(given.folder / "a.npz"))


@refused(
    r"a\.npz: image\.npy holds \d{6} bytes and promises 31\d{7}, more than 500 times as many: .* save it without compression"
)
def a_zip_that_becomes_a_thousand_times_as_large(given: Given) -> Iterator[None]:
    return _import(given, hostile.empty_npz(given.folder / "a.npz", 300 << 20))


@refused(r"a\.npz: expected exactly one array of images called image or images, found \.\./\.\./image\.npy; save it again")
def a_zip_whose_member_leads_elsewhere(given: Given) -> Iterator[None]:
    return _import(given, hostile.zipped(given.folder / "a.npz", "../../image.npy"))


@refused(
    r"each image of .*a\.npy has 100000×100000 pixels, and images of at most 16777216 pixels .* are read; resize or remove"
)
def an_array_of_enormous_images(given: Given) -> Iterator[None]:
    path = given.folder / "a.npy"
    path.write_bytes(hostile.npy((1, 100_000, 100_000, 1)))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 10**10)
    return _import(given, path)


@refused(r"a\.parquet holds \d+ bytes and promises \d{9,}, more than 500 times as many")
def a_table_with_the_same_image_without_end(given: Given) -> Iterator[None]:
    image = png(np.zeros((32, 32, 3), np.uint8))
    return _import(given, hostile.many_rows(given.folder / "a.parquet", {"image": image, "label": 0}, 2_000_000))


@refused(r"a\.parquet: the metadata of the hub cannot be read as JSON \(recursion limit .*\); it is cut off or damaged: copy")
def a_table_with_nested_metadata(given: Given) -> Iterator[None]:
    return _import(given, hostile.with_metadata(given.folder / "a.parquet", b"[" * 1_000_000))


@refused(
    r"0\.png \(row 0 of .*\) cannot be decoded \(Image size \(1000000000000 pixels\) exceeds limit .*\); replace or remove it"
)
def an_image_of_enormous_size(given: Given) -> Iterator[None]:
    return _import(given, _image(given, hostile.png_of(10**6, 10**6)))


@refused(
    r"0\.png \(row 0 of .*\) has 5000×5000 pixels, and images of at most 16777216 pixels \(4096×4096\) are read; resize or"
)
def an_image_of_a_large_size(given: Given) -> Iterator[None]:
    return _import(given, _image(given, hostile.png_of(5000, 5000)))


@refused(r"0\.png \(row 0 of .*\) cannot be decoded \(cannot identify image file .*\); replace or remove it")
def an_image_that_is_a_program(given: Given) -> Iterator[None]:
    program = given.folder / "bin" / "gs"  # what Pillow starts for PostScript
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nmkdir {given.folder / MARKER}\n")
    program.chmod(0o755)
    os.environ["PATH"] = f"{program.parent}:{os.environ['PATH']}"
    return _import(given, _image(given, hostile.POSTSCRIPT))


@refused(r"1\.png is no file, but a pipe, a device or a link to nothing; remove it")
def a_folder_with_a_pipe(given: Given) -> Iterator[None]:
    folder = _image(given, png(np.zeros((4, 4, 3), np.uint8)))
    os.mkfifo(folder / "cat" / "1.png")
    return _import(given, folder)


@refused(r"cat/back is a link to a folder that is read already; remove it")
def a_folder_that_holds_itself(given: Given) -> Iterator[None]:
    folder = _image(given, png(np.zeros((4, 4, 3), np.uint8)))
    (folder / "cat" / "back").symlink_to(folder / "cat")
    return _import(given, folder)


def _image(given: Given, content: bytes) -> Path:
    """A folder of images with one class of one image."""
    write_bytes(given.folder / "images" / "cat" / "0.png", content)
    return given.folder / "images"


# A model that one is given: proxyrob evaluate FILE


def _adopt(given: Given, name: str, content: bytes, published_as: str | None = None) -> Iterator[None]:
    path = given.folder / name
    path.write_bytes(content)
    yield
    adopt_model(identify_model(str(path), published_as), stage=given.new("given"))


WEIGHTS = (
    r"theirs\.pt cannot be read as tensors and plain values alone \({}\); a pickled model is never loaded: save its weights"
)


@refused(WEIGHTS.format("it holds more than tensors and plain values"))
def weights_that_are_a_pickle(given: Given) -> Iterator[None]:
    return _adopt(given, "theirs.pt", hostile.pickled(given.folder), "Sehwag2021Proxy_R18")


@refused(WEIGHTS.format("it holds more than tensors and plain values"))
def weights_that_ask_for_memory(given: Given) -> Iterator[None]:
    return _adopt(given, "theirs.pt", hostile.torch_bomb(), "Sehwag2021Proxy_R18")


@refused(WEIGHTS.format("its parts are compressed, .*"))
def weights_that_are_compressed(given: Given) -> Iterator[None]:
    return _adopt(given, "theirs.pt", hostile.torch_file({}, compressed=True), "Sehwag2021Proxy_R18")


ONNX = (
    r"theirs\.onnx keeps the tensor 'w' in another file \({}\), and no other file is opened; make one file of it where it comes"
)


@refused(ONNX.format("/etc/passwd"))
def a_network_with_weights_at_an_absolute_path(given: Given) -> Iterator[None]:
    return _adopt(given, "theirs.onnx", hostile.outside("/etc/passwd"))


@refused(ONNX.format(r"\.\./secret"))
def a_network_with_weights_outside_its_folder(given: Given) -> Iterator[None]:
    (given.folder.parent / "secret").write_bytes(bytes(40))
    return _adopt(given, "theirs.onnx", hostile.outside("../secret"))


@refused(ONNX.format("link"))
def a_network_with_weights_behind_a_link(given: Given) -> Iterator[None]:
    (given.folder.parent / "secret").write_bytes(bytes(40))
    (given.folder / "link").symlink_to(given.folder.parent / "secret")
    return _adopt(given, "theirs.onnx", hostile.outside("link"))


@refused(
    r"theirs\.onnx has 8589934592 bytes, and at most 2147483647 are read of such a file: .*; delete it, or put the right one"
)
def a_network_of_gigabytes(given: Given) -> Iterator[None]:
    for _ in _adopt(given, "theirs.onnx", b""):
        with (given.folder / "theirs.onnx").open("r+b") as file:
            file.truncate(hostile.BIG)
        yield


# A configuration that one is given, or that MLflow keeps


def _configure(given: Given, text: str) -> Iterator[None]:
    path = given.folder / "theirs.yaml"
    path.write_text(text)
    yield
    load_config(str(path))


@refused(r"theirs\.yaml is not valid YAML: could not determine a constructor for the tag .*python/object/apply:os\.mkdir")
def a_configuration_that_calls_a_function(given: Given) -> Iterator[None]:
    return _configure(given, f"extends: digits\nname: !!python/object/apply:os.mkdir [{given.folder / MARKER}]\n")


@refused(r"theirs\.yaml has more than 20000 values, counting what its aliases \(\*\) stand for; leave them out")
def a_configuration_of_aliases(given: Given) -> Iterator[None]:
    lists = [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]" for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
    ]
    return _configure(given, "\n".join(["a: &a [x, x]", *lists]))


@refused(r"theirs\.yaml has 1000016 bytes, a configuration at most 262144; give the right file")
def a_configuration_of_megabytes(given: Given) -> Iterator[None]:
    return _configure(given, "extends: digits\n" + "#" * 1_000_000)


# What happens to each


def _open(case: Case, given: Given, on_progress: Callable[..., None]) -> tuple[str, str, int]:
    """Plant and open; the error's type and text, and the memory that it took to find."""
    opening = case(given)
    next(opening)
    size, hard = psutil.Process().memory_info().vms + SPARE_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (size, hard))
    try:
        next(opening, None)
    except Exception as error:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        return type(error).__name__, str(error), 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return "accepted", "", 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_it_is_refused(case: Case, tmp_path: Path, digits: Stage, toy_classifier: Stage, evaluation: Stage) -> None:
    """By an error of ours in one line that names the file and the remedy, before memory is taken; its code does not run."""
    (tmp_path / "here").mkdir()
    given = Given(tmp_path / "here", digits, toy_classifier, evaluation)
    kind, text, taken = run_in_child(_open, threads=1, on_progress=lambda *_, **__: None, case=case, given=given)
    assert not list(tmp_path.rglob(MARKER)), "its code has run"
    assert kind in {DataIntegrityError.__name__, CheckpointMismatch.__name__, ValueError.__name__}, text
    assert re.search(CASES[case], text), text
    assert taken < MOST_TAKEN_BYTES


@pytest.mark.parametrize("content", [hostile.pickled, hostile.torch_trap])
def test_the_trap_springs_for_whoever_unpickles(content: Callable[[Path], bytes], tmp_path: Path) -> None:
    """So that the absence of its mark says something."""
    hostile.unpickle(content(tmp_path))
    assert (tmp_path / MARKER).is_dir()
