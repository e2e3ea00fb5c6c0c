"""Checkpoints that are refused: damaged ones, those of another configuration, and whatever would run foreign code."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from proxyrob.errors import CheckpointMismatch, DataIntegrityError
from proxyrob.storage import Stage, checkpoints
from proxyrob.storage.checkpoints import MAX_RECORD_BYTES
from proxyrob.storage.differences import describe_differences
from proxyrob.storage.files import sha256_of
from tests.conftest import MakeStage
from tests.toys import damage
from tests.unit.test_checkpoint import file_of, load, make_parts, record_of, save


@pytest.fixture
def stage(make_stage: MakeStage) -> Stage:
    """A stage with one checkpoint after 20 steps."""
    stage = make_stage("train", batch_size=128, inputs=[["source", "a" * 64], ["samples", "b" * 64]])
    save(stage, 20)
    return stage


def _alter_record(stage: Stage, **changes: Any) -> None:
    record_of(stage).write_text(json.dumps({**json.loads(record_of(stage).read_text()), **changes}))


def _write_as_if_ours(stage: Stage, content: bytes) -> None:
    """Replace the checkpoint's content and record its size and hash, as somebody would who wants it to be read."""
    file_of(stage).write_bytes(content)
    _alter_record(stage, sha256=sha256_of(file_of(stage)), size_bytes=len(content))


# Damage


@pytest.mark.parametrize(("steps", "then"), [((20,), "starts from its first step"), ((20, 30), "goes on from step 20")])
def test_a_damaged_checkpoint_is_refused_with_its_hash(make_stage: MakeStage, steps: tuple[int, ...], then: str) -> None:
    """One flipped byte is found before anything is read. The message says what to delete and what happens then, which it
    does; by itself no older checkpoint is taken."""
    stage = make_stage("train")
    for step in steps:
        save(stage, step)
    path = file_of(stage, steps[-1])
    expected = sha256_of(path)
    damage(path)
    with pytest.raises(DataIntegrityError) as error:
        load(stage, make_parts(1))
    remedy = f"delete {path.stem}.json and {path.name} in {stage.scratch} and run again: this stage then {then}"
    for part in (f"{path} is damaged", f"expected sha256 {expected}", remedy):
        assert part in str(error.value)
    path.unlink()
    record_of(stage, steps[-1]).unlink()
    assert load(stage, make_parts(1))[0] == (0, *steps)[-2]


@pytest.mark.parametrize("change", [-1, 1, 1_000_000])
def test_a_checkpoint_of_another_size_is_refused_without_reading_it(
    stage: Stage, change: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A truncated or a longer file is told by its size alone."""
    monkeypatch.setattr(checkpoints, "verify_file", None)
    size, sha256 = file_of(stage).stat().st_size, sha256_of(file_of(stage))
    with file_of(stage).open("rb+") as file:
        file.truncate(size + change)
    with pytest.raises(DataIntegrityError, match=f"expected {size} bytes with sha256 {sha256}, got {size + change} bytes"):
        load(stage, make_parts(1))


def test_a_missing_checkpoint_file_is_refused(stage: Stage) -> None:
    """A record of nothing is an error: silently starting anew would throw days away."""
    file_of(stage).unlink()
    with pytest.raises(DataIntegrityError, match=r"checkpoint-00000020\.pt is missing .*; delete checkpoint-00000020\.json"):
        load(stage, make_parts(1))


def test_a_damaged_record_is_refused(stage: Stage) -> None:
    """A truncated one, one that is too large to be read, one of another format or step: each with a remedy."""
    record_of(stage).write_text('{"digest": ')
    with pytest.raises(DataIntegrityError, match=r"checkpoint-00000020\.json cannot be read as format 1.*; delete checkpoint-"):
        load(stage, make_parts(1))
    record_of(stage).write_text(" " * (MAX_RECORD_BYTES + 1))
    with pytest.raises(DataIntegrityError, match=r"json has 1048577 bytes, a record at most 1048576; delete checkpoint-"):
        load(stage, make_parts(1))
    save(stage, 20)
    _alter_record(stage, format_version=2)
    with pytest.raises(DataIntegrityError, match="has format 2, this program reads format 1; use the program that"):
        load(stage, make_parts(1))
    save(stage, 20)
    _alter_record(stage, step=10)
    with pytest.raises(DataIntegrityError, match=r"checkpoint-00000020\.json is the record of step 10; delete checkpoint-"):
        load(stage, make_parts(1))


# Another configuration


def test_a_checkpoint_of_another_configuration_is_refused(stage: Stage, make_stage: MakeStage) -> None:
    """Weights trained under another configuration are never gone on from; what differs is said."""
    other = make_stage("train", batch_size=256, inputs=stage.configuration["inputs"])
    moved = Stage(other.name, other.digest, stage.folder, other.configuration)
    with pytest.raises(CheckpointMismatch) as error:
        load(moved, make_parts(1))
    for part in (
        f"{record_of(stage)} was written by another configuration of stage 'train' (digest {stage.digest[:12]}, expected "
        f"{other.digest[:12]}): these fields differ, batch_size: 128 and 256; delete {stage.scratch} and run again",
        "starts from its first step",
    ):
        assert part in str(error.value)


TRAIN = {"revision": 1, "values": {"batch_size": 128, "objective": {"values": {"kind": "pgd"}}, "rates": [0.1, 0.2]}}
INPUTS = [["source", "a" * 64], ["samples", "b" * 64], ["samples", "c" * 64]]
CHANGED_INPUTS = [["source", "a" * 64], ["samples", "b" * 64], ["samples", "d" * 64], ["labels", "e" * 64]]


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        (
            {"RobustTrainConfig": TRAIN, "seed": 0, "inputs": INPUTS},
            {
                "RobustTrainConfig": {**TRAIN, "values": {**TRAIN["values"], "batch_size": 256, "rates": (0.1, 0.3)}},
                "threat": "linf:8/255",
                "seed": 0,
                "inputs": CHANGED_INPUTS,
            },
            "these fields differ, RobustTrainConfig.values.batch_size: 128 and 256, RobustTrainConfig.values.rates.1: 0.2 and "
            '0.3, inputs.samples-3: "cccccccccccc" and "dddddddddddd", threat: not set and "linf:8/255", inputs.labels: not '
            'set and "eeeeeeeeeeee"',
        ),
        (
            {"seed": 0, "inputs": INPUTS},
            {"seed": 0, "inputs": CHANGED_INPUTS},
            'only inputs differ, samples-3: "cccccccccccc" and "dddddddddddd", labels: not set and "eeeeeeeeeeee"',
        ),
        (
            {f"field {k}": k for k in range(8)},
            {f"field {k}": -k for k in range(8)},
            "these fields differ, field 1: 1 and -1, field 2: 2 and -2, field 3: 3 and -3, field 4: 4 and -4, field 5: 5 and "
            "-5, and 2 more",
        ),
        ({"text": "x" * 99}, {"text": None}, f'these fields differ, text: "{"x" * 59}… and null'),
        ({"part": {"a": 1}}, {"part": {}}, "these fields differ, part.a: 1 and not set, part: not set and {}"),
        ({"a": 1}, {"a": 1}, "their configurations are equal, so another version of this program wrote it"),
        ({"inputs": "?"}, {"inputs": ["?"]}, 'these fields differ, inputs: "?" and not set, inputs.1: not set and "?"'),
    ],
)
def test_the_fields_that_differ_are_named(there: dict[str, Any], here: dict[str, Any], said: str) -> None:
    """Dotted paths with both values, five at most; inputs by their names; whatever another program wrote is no obstacle."""
    assert describe_differences(there, here) == said


def test_a_checkpoint_of_another_network_is_refused(stage: Stage) -> None:
    """Weights of another shape, or a part that was never saved, do not fit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(CheckpointMismatch, match=r"(?s)does not hold the state of this configuration: .*size mismatch"):
        load(stage, {"model": model})
    with pytest.raises(CheckpointMismatch, match=r"does not hold the state of this configuration: 'selection'"):
        load(stage, {**make_parts(1), "selection": nn.Linear(1, 1)})


def test_a_device_without_room_is_not_called_another_configuration(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """When memory runs out while a state is restored, that is what is said."""

    def runs_out(state_dict: dict[str, Any]) -> None:
        raise torch.OutOfMemoryError("out of memory")

    parts = make_parts(1)
    monkeypatch.setattr(parts["model"], "load_state_dict", runs_out)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        load(stage, parts)


# Foreign code


class _Trojan:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_checkpoint_with_foreign_objects_is_refused_and_not_run(stage: Stage, tmp_path: Path, how: str) -> None:
    """Only tensors and plain values are read: a pickle that would run code is refused before it runs."""
    content = {"parts": {"model": _Trojan(tmp_path / "ran")}, "history": []}
    if how == "torch":
        torch.save(content, tmp_path / "trojan.pt")
    else:
        (tmp_path / "trojan.pt").write_bytes(pickle.dumps(content, protocol=2))
    _write_as_if_ours(stage, (tmp_path / "trojan.pt").read_bytes())
    with pytest.raises(CheckpointMismatch, match="it holds more than tensors and plain values; delete"):
        load(stage, make_parts(1))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04" + b"\0" * 100, pickle.dumps([1, 2], protocol=2)])
def test_a_file_that_is_no_state_is_refused(stage: Stage, content: bytes) -> None:
    """Whatever its hash says, a file of something else ends in the same error with the same remedy."""
    _write_as_if_ours(stage, content)
    with pytest.raises(CheckpointMismatch, match=r"does not hold the state of this configuration: .*; delete"):
        load(stage, make_parts(1))
