"""Checkpoints: whole or not at all, bound to a configuration, and never a way for foreign code to run."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from proxyrob.errors import CheckpointMismatch, DataIntegrityError
from proxyrob.storage import Stage
from proxyrob.storage.checkpoint import POINTER, load_checkpoint, save_checkpoint
from proxyrob.storage.files import sha256_of
from tests.conftest import MakeStage
from tests.toys import damage, files_below, same_state

HISTORY = ({"step": 10, "loss": 1.5}, {"step": 20, "loss": 1.25})


def _parts(seed: int) -> dict[str, nn.Module | torch.optim.Optimizer]:
    """A model and an optimizer that has taken a step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.rand(4, 3)).square().sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.fixture
def stage(make_stage: MakeStage) -> Stage:
    """A stage with one checkpoint after 20 steps."""
    stage = make_stage("train")
    save_checkpoint(stage, 20, _parts(0), HISTORY)
    return stage


def _checkpoint(stage: Stage) -> Path:
    (path,) = stage.scratch.glob("checkpoint-*.pt")
    return path


def _write_as_if_ours(stage: Stage, content: bytes) -> None:
    """Replace the checkpoint's content and record its new hash, as somebody would who wants it to be read."""
    path = _checkpoint(stage)
    path.write_bytes(content)
    pointer = json.loads((stage.scratch / POINTER).read_text())
    (stage.scratch / POINTER).write_text(json.dumps({**pointer, "sha256": sha256_of(path)}))


def test_without_a_checkpoint_work_starts_at_the_first_step(make_stage: MakeStage) -> None:
    """Nothing is restored and the parts stay as they are."""
    parts, before = _parts(1), _parts(1)
    assert load_checkpoint(make_stage("train"), parts, "cpu") == (0, ())
    assert same_state(parts["model"].state_dict(), before["model"].state_dict())


def test_a_checkpoint_restores_every_part(stage: Stage) -> None:
    """Weights, running statistics, optimizer moments, the number of steps and the history come back bit for bit."""
    saved, restored = _parts(0), _parts(1)
    assert not same_state(saved["model"].state_dict(), restored["model"].state_dict())
    assert load_checkpoint(stage, restored, "cpu") == (20, HISTORY)
    assert same_state(saved["model"].state_dict(), restored["model"].state_dict())
    moments, expected = (parts["optimizer"].state_dict()["state"] for parts in (restored, saved))
    assert moments.keys() == expected.keys() != set()
    assert all(same_state(moments[k], expected[k]) for k in expected)


def test_only_the_newest_checkpoint_is_kept(stage: Stage) -> None:
    """A later one replaces the earlier one, and the pointer names it."""
    save_checkpoint(stage, 30, _parts(2))
    assert files_below(stage.scratch) == {POINTER, "checkpoint-00000030.pt"}
    restored = _parts(1)
    assert load_checkpoint(stage, restored, "cpu") == (30, ())
    assert same_state(restored["model"].state_dict(), _parts(2)["model"].state_dict())


def test_a_kill_between_file_and_pointer_leaves_the_old_checkpoint(stage: Stage) -> None:
    """The pointer is replaced last: a new file that it does not name yet is ignored."""
    (stage.scratch / "checkpoint-00000030.pt").write_bytes(b"whole, but not yet named")
    assert load_checkpoint(stage, _parts(1), "cpu")[0] == 20


def test_a_damaged_checkpoint_is_refused_with_its_hash(stage: Stage) -> None:
    """One flipped byte is found before anything is read from it; the message says what to delete and what happens then."""
    path = _checkpoint(stage)
    expected = sha256_of(path)
    damage(path)
    with pytest.raises(DataIntegrityError) as error:
        load_checkpoint(stage, _parts(1), "cpu")
    for part in (str(path), f"expected sha256 {expected}", f"delete the folder {stage.scratch}", "starts from its first step"):
        assert part in str(error.value)


def test_a_missing_checkpoint_file_is_refused(stage: Stage) -> None:
    """A pointer to nothing is an error: silently starting anew would throw days away."""
    _checkpoint(stage).unlink()
    with pytest.raises(DataIntegrityError, match=r"checkpoint-00000020\.pt is missing"):
        load_checkpoint(stage, _parts(1), "cpu")


def test_a_damaged_pointer_is_refused(stage: Stage) -> None:
    """A truncated pointer is an error with a remedy."""
    (stage.scratch / POINTER).write_text('{"digest": ')
    with pytest.raises(DataIntegrityError, match=r"checkpoint\.json cannot be read; delete the folder"):
        load_checkpoint(stage, _parts(1), "cpu")


def test_a_checkpoint_of_another_digest_is_refused(stage: Stage) -> None:
    """Weights trained under another configuration are never gone on from."""
    other = Stage(stage.name, "f" * 64, stage.folder, {})
    with pytest.raises(CheckpointMismatch, match=f"digest {stage.digest[:12]}, expected ffffffffffff"):
        load_checkpoint(other, _parts(1), "cpu")


def test_a_checkpoint_of_another_network_is_refused(stage: Stage) -> None:
    """Weights of another shape, or a part that was never saved, do not fit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(CheckpointMismatch, match="does not hold the state of this configuration"):
        load_checkpoint(stage, {"model": model}, "cpu")
    with pytest.raises(CheckpointMismatch, match="'average'"):
        load_checkpoint(stage, {**_parts(1), "average": nn.Linear(1, 1)}, "cpu")


class _Trojan:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_checkpoint_with_foreign_objects_is_refused_and_not_run(stage: Stage, tmp_path: Path, how: str) -> None:
    """Only tensors and plain values are read: a pickle that would run code is refused before it runs."""
    content = {"model": _Trojan(tmp_path / "ran"), "optimizer": {}}
    if how == "torch":
        torch.save(content, tmp_path / "trojan.pt")
    else:
        (tmp_path / "trojan.pt").write_bytes(pickle.dumps(content, protocol=2))
    _write_as_if_ours(stage, (tmp_path / "trojan.pt").read_bytes())
    with pytest.raises(CheckpointMismatch, match="does not hold the state"):
        load_checkpoint(stage, _parts(1), "cpu")
    assert not (tmp_path / "ran").exists()
