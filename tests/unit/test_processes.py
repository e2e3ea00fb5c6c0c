"""One training in two processes: the training of one process, and nobody left waiting."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

from proxyrob.config import (
    CnnModel,
    ModelConfig,
    PgdObjective,
    ResnetModel,
    RobustTrainConfig,
    SmoothTrainConfig,
    load_config,
)
from proxyrob.config.objective import AwpConfig, NaturalObjective, SmoothAdvObjective, TradesObjective
from proxyrob.config.optimizer import SgdOptimizer
from proxyrob.device import require_devices
from proxyrob.errors import NonFiniteLoss
from proxyrob.mix import SyntheticSet
from proxyrob.models import load_classifier
from proxyrob.storage import Stage
from proxyrob.threat import parse_threat
from proxyrob.train import TrainReport, read_curve, read_history, train_classifier, train_in_processes
from proxyrob.train.launch import run_in_processes
from tests.conftest import MakeStage
from tests.ranks import Job, Outcome, fail_in_the_second, train_all, wait_for_stop
from tests.toys import Recorder, StopHereError, files_below, same_state

THREAT = parse_threat("linf:0.15")
CNN, RESNET = CnnModel(widths=(4, 6)), ResnetModel(widths=(4, 6))
SHORT: dict[str, Any] = {
    "steps": 6,
    "batch_size": 12,
    "checkpoint_every": 2,
    "learning_rate": 0.02,
    "optimizer": SgdOptimizer(),
}
REAL_ONLY: dict[str, Any] = {"synthetic_fraction": 0.0, "gamma": 1.0}
AWP = AwpConfig(gamma=0.01, warmup=0.3)
PGD = RobustTrainConfig(objective=PgdObjective(attack_steps=2, awp=AWP), **SHORT, **REAL_ONLY)
READS_OF_A_STEP = 3
"""How often a step of ``PGD`` asks whether to stop: at its beginning and before each of two steps of its attack."""

LONG_ATTACK = 5000
"""Steps of an attack that takes many times as long as a process takes to learn that another was asked to stop."""

Config = RobustTrainConfig | SmoothTrainConfig
CONFIGS: dict[str, tuple[Config, ModelConfig]] = {
    "natural, mixed": (
        RobustTrainConfig(objective=NaturalObjective(), shift=1, flip=True, validate_every=3, **SHORT).replace(
            batch_size=16, cutmix=0.5
        ),
        CNN,
    ),
    "pgd, in parts": (PGD.replace(micro_batch=4, validate_every=3), CNN),
    "trades": (RobustTrainConfig(objective=TradesObjective(attack_steps=2, awp=AWP), **SHORT), CNN),
    "smoothadv": (SmoothTrainConfig(objective=SmoothAdvObjective(attack_steps=2), **SHORT), CNN),
    "synced": (PGD.replace(sync_batchnorm=True), RESNET),
    "synced in the attack, in parts": (
        PGD.replace(objective=PgdObjective(attack_steps=2, attack_batchnorm="train"), sync_batchnorm=True, micro_batch=4),
        RESNET,
    ),
}


@pytest.fixture
def arguments(digits: Stage) -> dict[str, Any]:
    """The arguments of a training on real images, without its stage."""
    return {"model": CNN, "config": PGD, "source": digits, "synthetic": (), "threat": THREAT, "seed": 0}


def in_two(*jobs: Job) -> list[list[Outcome]]:
    """The outcomes of trainings in two processes, one training after the other."""
    return run_in_processes(2, train_all, {"jobs": list(jobs)})


def weights_of(stage: Stage) -> dict[str, torch.Tensor]:
    """What a training released."""
    return load_classifier(stage).state_dict()


def require_near(ours: Stage, theirs: Stage) -> None:
    """Losses, curves, released weights and running statistics of two trainings are the same to rounding."""
    columns = ["time_s"]
    pd.testing.assert_frame_equal(
        read_history(ours).drop(columns=columns), read_history(theirs).drop(columns=columns), rtol=1e-5, atol=0
    )
    pd.testing.assert_frame_equal(read_curve(ours).drop(columns=columns), read_curve(theirs).drop(columns=columns))
    for name, tensor in weights_of(theirs).items():
        torch.testing.assert_close(weights_of(ours)[name], tensor, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_train_as_one(
    name: str, arguments: dict[str, Any], synthetic: SyntheticSet, make_stage: MakeStage
) -> None:
    """Losses and weights are those of one process, to rounding; both processes report the same, the first alone tells it."""
    config, model = CONFIGS[name]
    arguments |= {"config": config, "model": model, "synthetic": (synthetic,) if config.num_synthetic else ()}
    arguments["threat"] = THREAT if isinstance(config, RobustTrainConfig) else None
    alone, together, recorder = make_stage("train", k=1), make_stage("train", k=2), Recorder()
    expected = train_classifier(**arguments, stage=alone, on_progress=recorder)
    ((first, second),) = in_two(Job(arguments | {"stage": together}))
    assert (first.value, second.value) == (expected, expected), first.error
    assert (first.told, second.told) == ([done for done, _ in recorder.told], [])
    assert files_below(together.folder) == files_below(alone.folder)
    require_near(together, alone)


def test_without_synchronisation_processes_have_statistics_of_their_own(
    arguments: dict[str, Any], make_stage: MakeStage
) -> None:
    """Not one process's statistics; and what is released is one state, from which a stopped training goes on exactly."""
    arguments |= {"config": PGD.replace(validate_every=2), "model": RESNET}
    alone, whole, pieces = (make_stage("train", k=k) for k in range(3))
    train_classifier(**arguments, stage=alone)
    outcomes = in_two(
        Job(arguments | {"stage": whole}), Job(arguments | {"stage": pieces}, stop=(1, 10)), Job(arguments | {"stage": pieces})
    )
    assert [outcome.value for outcome in outcomes[1]] == [InterruptedError, InterruptedError]
    assert outcomes[0][0].value == outcomes[2][0].value == outcomes[2][1].value
    assert same_state(weights_of(whole), weights_of(pieces))
    name = "network.bn1.running_var"
    assert not torch.allclose(weights_of(whole)[name], weights_of(alone)[name], rtol=1e-3)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_asked_of_one_process_ends_both(rank: int, arguments: dict[str, Any], make_stage: MakeStage) -> None:
    """In the middle of a step: both raise, the steps that are done are in a checkpoint, and either number of processes goes
    on from it to the same end."""
    alone, stages = make_stage("train"), [make_stage("train", k=k) for k in range(2)]
    train_classifier(**arguments, stage=alone)
    (stopped,) = in_two(Job(arguments | {"stage": stages[0]}, stop=(rank, 3 * READS_OF_A_STEP + 1)))
    for outcome in stopped:
        assert (outcome.value, outcome.error[:30]) == (InterruptedError, "asked to stop: 3 of 6 steps ar")
    train_classifier(**arguments, stage=stages[0])
    require_near(stages[0], alone)
    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] > 3 * READS_OF_A_STEP + 1

    with pytest.raises(InterruptedError, match="3 of 6 steps"):
        train_classifier(**arguments, stage=stages[1], should_stop=stop)
    in_two(Job(arguments | {"stage": stages[1]}))
    require_near(stages[1], alone)


@pytest.mark.parametrize("tied", [False, True], ids=["each by itself", "in step"])
def test_a_stop_ends_a_long_attack(tied: bool, arguments: dict[str, Any], make_stage: MakeStage) -> None:
    """The other process leaves the attack before its end, too; also where batch normalisation makes each wait for the other."""
    attack = PgdObjective(attack_steps=LONG_ATTACK, attack_batchnorm="train" if tied else "eval")
    arguments |= {"config": PGD.replace(objective=attack, sync_batchnorm=tied), "model": RESNET if tied else CNN}
    (stopped,) = in_two(Job(arguments | {"stage": make_stage("train")}, stop=(1, 4)))
    assert [outcome.value for outcome in stopped] == [InterruptedError, InterruptedError]
    assert stopped[1].asked == 5
    assert stopped[0].asked < LONG_ATTACK


def test_what_cannot_be_trained_ends_both(arguments: dict[str, Any], make_stage: MakeStage) -> None:
    """A batch that cannot be shared, a loss that is not finite and a layer that is not there end both processes alike; the
    images that are named are those of the process they are in."""
    stage, absurd = make_stage("train"), PGD.replace(learning_rate=1e25, objective=NaturalObjective())
    uneven, diverged, absent = in_two(
        Job(arguments | {"stage": stage, "config": PGD.replace(batch_size=13)}),
        Job(arguments | {"stage": stage, "config": absurd}),
        Job(arguments | {"stage": stage, "config": PGD.replace(sync_batchnorm=True)}),
    )
    for outcome in uneven:
        assert (outcome.value, outcome.told) == (ValueError, [])
        assert outcome.error.startswith("13 images of a batch cannot be shared by 2 process(es)")
    for outcome in absent:
        assert outcome.value is ValueError
        assert "no effect on a model without batch normalisation" in outcome.error
    with pytest.raises(NonFiniteLoss, match="at step 1 ") as alone:
        train_classifier(**arguments | {"stage": stage, "config": absurd})
    images = str(alone.value).partition("images [")[2].partition("]")[0].split(", ")
    for outcome in diverged:
        assert outcome.value is NonFiniteLoss
        for rank, share in enumerate((images[:6], images[6:])):
            assert f"at step 1 in process {rank} (real images [{', '.join(share)}])" in outcome.error
    assert files_below(stage.folder) == set()


def test_a_model_without_batch_normalisation_is_not_synchronised(arguments: dict[str, Any], make_stage: MakeStage) -> None:
    """One process refuses it, too, and so does the configuration of a run; with batch normalisation one process trains as
    without the setting, bit for bit."""
    with pytest.raises(ValueError, match=r"train\.sync_batchnorm has no effect on a cnn"):
        load_config("digits", ["train.sync_batchnorm=true"])
    assert load_config("digits", ["train.sync_batchnorm=true", "model.kind=resnet"])
    with pytest.raises(ValueError, match="no effect on a model without batch normalisation"):
        train_classifier(**arguments | {"config": PGD.replace(sync_batchnorm=True), "stage": make_stage("train")})
    stages = [make_stage("train", synced=synced) for synced in (False, True)]
    for synced, stage in zip((False, True), stages, strict=True):
        train_classifier(**arguments | {"config": PGD.replace(sync_batchnorm=synced), "model": RESNET, "stage": stage})
    assert same_state(*map(weights_of, stages))


def test_training_in_processes_passes_on_what_it_is_given(arguments: dict[str, Any], make_stage: MakeStage) -> None:
    """The report, the progress of the first process, and a stop that is asked for here."""
    stage, recorder = make_stage("train"), Recorder()
    with pytest.raises(InterruptedError, match="asked to stop: 0 of 6 steps"):
        train_in_processes(2, **arguments, stage=stage, should_stop=lambda: True)
    report = train_in_processes(2, **arguments, stage=stage, on_progress=recorder)
    assert report == stage.finished(TrainReport)
    assert recorder.told == [(2, 6), (4, 6), (6, 6)]
    assert recorder.figures[-1]["loss"] == read_history(stage).loss.iloc[-1]


def test_processes_are_a_group() -> None:
    """Each has its rank and as many threads as this process; a stop that is asked for here reaches all."""
    told: list[int] = []
    found = run_in_processes(
        2, wait_for_stop, {}, should_stop=lambda: len(told) == 2, on_progress=lambda done, total, **figures: told.append(done)
    )
    assert found == [(0, 2, 1), (1, 2, 1)]
    assert os.getpid() not in told
    assert_gone(told)


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        pytest.param("error", KeyError, "lost", id="error"),
        pytest.param("killed", ChildProcessError, r"process 1 of 2 ended without an answer \(exit code -9\)", id="killed"),
    ],
)
def test_an_error_in_one_process_ends_the_other(how: str, error: type[Exception], text: str) -> None:
    """Within seconds, with that error, while the other waits for the one that failed."""
    told: list[int] = []
    started = time.monotonic()
    with pytest.raises(error, match=text) as caught:
        run_in_processes(2, fail_in_the_second, {"how": how}, on_progress=lambda done, total, **figures: told.append(done))
    assert time.monotonic() - started < 20
    assert how == "killed" or "In process 1 of 2:\nTraceback" in caught.value.__notes__[0]
    assert_gone(told)


def test_an_error_here_ends_the_processes() -> None:
    """Nobody is left behind when the caller's own progress raises."""
    told: list[int] = []

    def fail(done: int, total: int, **figures: float) -> None:
        told.append(done)
        if len(told) == 2:
            raise StopHereError

    with pytest.raises(StopHereError):
        run_in_processes(2, wait_for_stop, {}, on_progress=fail)
    assert_gone(told)


def test_more_processes_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], make_stage: MakeStage
) -> None:
    """A GPU for each process, or a message; on the CPU any number will do."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    require_devices("cuda", 2)
    require_devices("cuda:1", 1)
    require_devices("cpu", 64)
    for name, count in (("cuda", 3), ("cuda:1", 2)):
        with pytest.raises(ValueError, match=f"{count} processes need a GPU each, got device '{name}' on a machine with 2"):
            require_devices(name, count)
    with pytest.raises(ValueError, match="3 processes need a GPU each"):
        train_in_processes(3, **arguments, stage=make_stage("train"), device="cuda")


CALLER = """
from tests.ranks import wait_for_stop
from proxyrob.train.launch import run_in_processes

if __name__ == "__main__":
    run_in_processes(2, wait_for_stop, {}, on_progress=lambda done, total, **figures: print(done, flush=True))
"""


@pytest.mark.slow
def test_processes_end_with_their_caller(tmp_path: Path) -> None:
    """Also when it is killed, and can tell them nothing."""
    script = tmp_path / "caller.py"
    script.write_text(CALLER)
    root = str(Path(__file__).parents[2])
    caller = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": root}, text=True
    )
    assert caller.stdout is not None
    try:
        told = [int(caller.stdout.readline()) for _ in range(2)]
    finally:
        os.kill(caller.pid, signal.SIGKILL)
        caller.communicate(timeout=60)
    assert_gone(told)


def assert_gone(told: list[int]) -> None:
    """Two processes were there, and end within seconds."""
    assert len(set(told)) == 2
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in told):
        assert time.monotonic() < deadline
        time.sleep(0.02)
