"""Checkpoints of a stage: taken at once, written beside the work, whole or not at all; which are kept, and what can fail."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from proxyrob.schedule import average_with_warmup, one_cycle
from proxyrob.storage import Stage, checkpoints
from proxyrob.storage.checkpoints import Checkpoints
from tests.conftest import MakeStage
from tests.toys import files_below, same_state

HISTORY = ({"step": 10, "loss": 1.5}, {"step": 20, "loss": 1.25})


def make_parts(seed: int) -> dict[str, Any]:
    """A training that has taken a step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    rates = {"warmup_share": 0.3, "initial_factor": 0.1, "final_factor": 0.01}
    schedule = one_cycle(optimizer, 50, **rates, cycles_momentum=True)
    average = AveragedModel(model, multi_avg_fn=average_with_warmup(0.9))
    model(torch.rand(4, 3)).square().sum().backward()
    optimizer.step()
    schedule.step()
    average.update_parameters(model)
    return {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}


def save(stage: Stage, step: int, seed: int = 0) -> None:
    """Write one checkpoint of ``make_parts(seed)``."""
    with Checkpoints(stage) as opened:
        opened.save(step, make_parts(seed), HISTORY)


def load(stage: Stage, parts: dict[str, Any]) -> tuple[int, tuple[dict[str, float], ...]]:
    """Restore the newest checkpoint; its step and history."""
    with Checkpoints(stage) as opened:
        return opened.load(parts, "cpu")


@pytest.fixture
def stage(make_stage: MakeStage) -> Stage:
    """A stage with one checkpoint after 20 steps."""
    stage = make_stage("train")
    save(stage, 20)
    return stage


def file_of(stage: Stage, step: int = 20) -> Path:
    """Where a checkpoint lies."""
    return stage.scratch / f"checkpoint-{step:08d}.pt"


def record_of(stage: Stage, step: int = 20) -> Path:
    """Where its record lies."""
    return stage.scratch / f"checkpoint-{step:08d}.json"


def _names(*steps: int) -> set[str]:
    return {f"checkpoint-{step:08d}.{kind}" for step in steps for kind in ("json", "pt")}


def _fails(*args: Any) -> None:
    raise OSError("the disk is on fire")


# Taking and restoring


def test_without_a_checkpoint_work_starts_at_the_first_step(make_stage: MakeStage) -> None:
    """Nothing is restored and the parts stay as they are."""
    parts, before = make_parts(1), make_parts(1)
    assert load(make_stage("train"), parts) == (0, ())
    assert same_state(parts["model"].state_dict(), before["model"].state_dict())


def test_a_checkpoint_restores_every_part(stage: Stage) -> None:
    """Weights, running statistics, averages, moments, schedule, number of steps and history come back bit for bit."""
    saved, restored = make_parts(0), make_parts(1)
    assert not same_state(saved["model"].state_dict(), restored["model"].state_dict())
    assert load(stage, restored) == (20, HISTORY)
    for name in ("model", "average"):
        assert same_state(saved[name].state_dict(), restored[name].state_dict())
    moments, expected = (parts["optimizer"].state_dict()["state"] for parts in (restored, saved))
    assert moments.keys() == expected.keys() != set()
    assert all(same_state(moments[k], expected[k]) for k in expected)
    assert restored["optimizer"].param_groups[0]["betas"] == saved["optimizer"].param_groups[0]["betas"] != (0.9, 0.999)
    assert restored["schedule"].state_dict() == saved["schedule"].state_dict()


def test_the_history_of_a_long_training_is_kept(make_stage: MakeStage) -> None:
    """Thousands of rows come back as they were, each number with its type, and lie in the file rather than in its record."""
    stage = make_stage("train")
    rows = [{"step": 10 * k, "loss": 1.0 / (k + 1)} for k in range(5000)]
    with Checkpoints(stage) as opened:
        opened.save(50_000, make_parts(0), rows)
    step, history = load(stage, make_parts(1))
    assert (step, list(history)) == (50_000, rows)
    assert isinstance(history[7]["step"], int)
    assert record_of(stage, 50_000).stat().st_size < 1000


@contextmanager
def _held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While the event is not set the writer waits, as before a slow disk."""
    write, go_on = checkpoints.write_snapshot, threading.Event()

    def wait_and_write(*args: Any) -> None:
        assert go_on.wait(30)
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_snapshot", wait_and_write)
        try:
            yield go_on
        finally:
            go_on.set()


def test_a_checkpoint_is_the_state_when_it_was_saved(make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes while it is being written is not in it: weights, moments, statistics, the history."""
    stage, parts, rows = make_stage("train"), make_parts(0), [dict(row) for row in HISTORY]
    with _held(monkeypatch) as go_on, Checkpoints(stage) as opened:
        opened.save(20, parts, rows)
        assert not record_of(stage).exists(), "it is not written before save returns"
        with torch.no_grad():
            parts["model"][0].weight.fill_(7.0)
            parts["average"].module[0].weight.fill_(7.0)
            parts["model"][1].running_mean.fill_(7.0)
            parts["optimizer"].state[parts["model"][0].weight]["exp_avg"].fill_(7.0)
        parts["optimizer"].param_groups[0]["lr"] = 7.0
        rows[0]["loss"] = 7.0
        rows.append({"step": 30, "loss": 7.0})
        go_on.set()
    expected, restored = make_parts(0), make_parts(1)
    assert load(stage, restored) == (20, HISTORY)
    for name in ("model", "average"):
        assert same_state(restored[name].state_dict(), expected[name].state_dict())
    found, wanted = (parts["optimizer"].state_dict() for parts in (restored, expected))
    assert same_state(found["state"][0], wanted["state"][0])
    assert found["param_groups"] == wanted["param_groups"]


class _Counted:
    """A part that counts how often its state was taken."""

    def __init__(self) -> None:
        self.taken = 0

    def state_dict(self) -> dict[str, Any]:
        self.taken += 1
        return {"taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.taken = state_dict["taken"]


def test_a_checkpoint_waits_for_the_one_before_it(make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is never more than one copy of the state: the next is taken when the one before is written, and waits for it."""
    stage, part = make_stage("train"), _Counted()
    with _held(monkeypatch) as go_on, Checkpoints(stage) as opened:
        opened.save(10, {"part": part})
        second = threading.Thread(target=lambda: opened.save(20, {"part": part}))
        second.start()
        second.join(0.2)
        assert (second.is_alive(), part.taken) == (True, 1)
        go_on.set()
        second.join(30)
        assert (second.is_alive(), part.taken) == (False, 2)
    assert files_below(stage.scratch) == _names(10, 20)


def test_the_copy_of_the_state_is_gone_before_it_is_sent(make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sending to a slow store costs no memory: what is sent is the file."""
    take, taken, gone = checkpoints.take_snapshot, [], []

    def take_and_watch(*args: Any) -> Any:
        snapshot = take(*args)
        taken.append(weakref.ref(snapshot))
        return snapshot

    monkeypatch.setattr(checkpoints, "take_snapshot", take_and_watch)
    monkeypatch.setattr(Checkpoints, "_send", lambda opened: gone.append(taken[-1]() is None))
    with Checkpoints(make_stage("train")) as opened:
        opened.save(10, make_parts(0))
        opened.save(20, make_parts(0))
    assert gone == [True, True]


def test_who_asks_to_wait_gets_a_whole_checkpoint(make_stage: MakeStage) -> None:
    """With ``wait`` it is on disk when ``save`` returns, for a process that is about to end."""
    stage = make_stage("train")
    with Checkpoints(stage) as opened:
        opened.save(20, make_parts(0), wait=True)
        assert record_of(stage).is_file()
        assert load(stage, make_parts(1))[0] == 20


def test_leaving_the_block_by_an_error_waits_for_the_checkpoint(make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that diverges, or is stopped, still leaves the checkpoint that was being written."""
    stage = make_stage("train")

    def work_and_stop(go_on: threading.Event) -> None:
        with Checkpoints(stage) as opened:
            opened.save(20, make_parts(0))
            threading.Timer(0.1, go_on.set).start()
            raise KeyboardInterrupt

    with _held(monkeypatch) as go_on, pytest.raises(KeyboardInterrupt):
        work_and_stop(go_on)
    assert load(stage, make_parts(1))[0] == 20


def test_a_view_is_kept_without_what_it_is_a_view_of(make_stage: MakeStage) -> None:
    """Of a tensor that shares the memory of a large one its own values are kept, and of a broadcast one all of them."""
    stage, large = make_stage("train"), torch.arange(1_000_000.0)
    module = nn.Module()
    module.register_buffer("part", large[10:13])
    module.register_buffer("same", torch.ones(()).expand(3))
    with Checkpoints(stage) as opened:
        opened.save(20, {"module": module})
    assert file_of(stage).stat().st_size < 10_000
    restored = nn.Module()
    restored.register_buffer("part", torch.zeros(3))
    restored.register_buffer("same", torch.zeros(3))
    load(stage, {"module": restored})
    found = {name: buffer.tolist() for name, buffer in restored.named_buffers()}
    assert found == {"part": [10.0, 11.0, 12.0], "same": [1.0, 1.0, 1.0]}


class _Foreign(_Counted):
    """A part whose state holds something that is neither a tensor nor a plain value."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"nested": [{"value": self.value}]}


@pytest.mark.parametrize("value", [np.float64(0.1), np.zeros(3), Path("/"), {1, 2}, torch.float32])
def test_a_state_that_could_not_be_read_back_is_refused_when_it_is_saved(make_stage: MakeStage, value: object) -> None:
    """A checkpoint that can be written can be read: other objects are refused at once, with the name of the part."""
    stage = make_stage("train")
    with (
        pytest.raises(TypeError, match=rf"in the state of foreign, got .*{type(value).__name__}; convert it"),
        Checkpoints(stage) as opened,
    ):
        opened.save(20, {"foreign": _Foreign(value)})
    assert files_below(stage.scratch) == set()


# Which are kept


@pytest.mark.parametrize(("keep", "steps"), [(1, [40]), (2, [30, 40]), (3, [20, 30, 40])])
def test_the_newest_checkpoints_are_kept(make_stage: MakeStage, keep: int, steps: list[int]) -> None:
    """Older ones go when a newer one is whole, and the newest is the one that is loaded."""
    stage = make_stage("train")
    with Checkpoints(stage, keep=keep) as opened:
        for seed, step in enumerate((10, 20, 30, 40)):
            opened.save(step, make_parts(seed))
    assert files_below(stage.scratch) == _names(*steps)
    restored = make_parts(9)
    assert load(stage, restored)[0] == 40
    assert same_state(restored["model"].state_dict(), make_parts(3)["model"].state_dict())


def test_no_checkpoint_at_all_cannot_be_kept(make_stage: MakeStage) -> None:
    """Keeping none is refused before any work."""
    with pytest.raises(ValueError, match="expected to keep at least 1 checkpoint, got 0"):
        Checkpoints(make_stage("train"), keep=0)


def test_the_same_step_can_be_saved_again(stage: Stage) -> None:
    """A process that is stopped right after it resumed writes its step anew; the later state counts."""
    save(stage, 20, seed=5)
    restored = make_parts(1)
    assert load(stage, restored)[0] == 20
    assert same_state(restored["model"].state_dict(), make_parts(5)["model"].state_dict())


def test_a_step_that_is_saved_again_never_has_the_record_of_another_file(
    make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended between file and record, the step has no checkpoint, and the one before it is taken: none is damaged."""
    stage = make_stage("train")
    save(stage, 10)
    save(stage, 20)
    monkeypatch.setattr(checkpoints, "_as_json", _fails)
    with pytest.raises(OSError, match="on fire"):
        save(stage, 20, seed=5)
    assert load(stage, make_parts(1))[0] == 10


def test_steps_beyond_eight_digits_are_in_order(stage: Stage) -> None:
    """The newest is that of the highest step, not the last in the alphabet."""
    save(stage, 99_999_999)
    save(stage, 100_000_000)
    assert load(stage, make_parts(1))[0] == 100_000_000


def test_what_a_kill_left_is_removed_by_the_next_checkpoint(stage: Stage) -> None:
    """Temporary files and files without a record count for nothing, and go before a new one takes their space."""
    left = ["checkpoint-00000030.pt", ".checkpoint-00000030.pt.0123abcd.part", ".checkpoint-00000020.json.89abcdef.part"]
    for name in left:
        (stage.scratch / name).write_bytes(b"half")
    (stage.scratch / "other").write_bytes(b"not a checkpoint")
    assert load(stage, make_parts(1))[0] == 20
    save(stage, 25)
    assert files_below(stage.scratch) == {"other", *_names(20, 25)}


def test_a_finished_stage_has_no_checkpoints(stage: Stage) -> None:
    """Clearing waits for the one that is being written, and leaves nothing."""
    with Checkpoints(stage) as opened:
        opened.save(30, make_parts(0))
        opened.clear()
    assert files_below(stage.folder) == set()


# Errors of the writer


def test_an_error_of_the_writer_is_raised_at_the_next_checkpoint(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told once, the checkpoint before it is still good, and with its cause gone saving goes on."""
    with Checkpoints(stage) as opened:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "write_snapshot", _fails)
            opened.save(30, make_parts(0))
            with pytest.raises(OSError, match="on fire"):
                opened.save(40, make_parts(0))
        assert files_below(stage.scratch) == _names(20)
        opened.save(50, make_parts(0))
    assert load(stage, make_parts(1))[0] == 50


def test_an_error_of_the_writer_is_raised_at_the_end(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint of a block is no exception, nor is one that was waited for, nor one of a stage that is cleared."""
    monkeypatch.setattr(checkpoints, "write_snapshot", _fails)
    with pytest.raises(OSError, match="on fire"), Checkpoints(stage) as opened:
        opened.save(30, make_parts(0))
    with Checkpoints(stage) as opened, pytest.raises(OSError, match="on fire"):
        opened.save(30, make_parts(0), wait=True)
    opened = Checkpoints(stage)
    opened.save(30, make_parts(0))
    opened.clear()
    with pytest.raises(OSError, match="on fire"):
        opened.__exit__(None, None, None)


def test_an_error_of_the_writer_does_not_hide_that_of_the_work(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the work has failed, too, its own error is raised and the writer's is noted on it."""
    monkeypatch.setattr(checkpoints, "write_snapshot", _fails)

    def diverge() -> None:
        with Checkpoints(stage) as opened:
            opened.save(30, make_parts(0))
            raise ArithmeticError("the loss is nan")

    with pytest.raises(ArithmeticError, match="the loss is nan") as raised:
        diverge()
    assert raised.value.__notes__ == ["besides, a checkpoint could not be written: OSError('the disk is on fire')"]
