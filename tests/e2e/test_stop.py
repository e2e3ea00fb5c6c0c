"""Told to stop in the middle of a training, a run keeps what it has done, and the next one goes on from there."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flows.plan import plan_pipeline
from proxyrob.config import load_config
from proxyrob.train import read_history
from tests.e2e.conftest import Program
from tests.toys import REAL_ONLY

STEPS, EVERY = 600, 50


def _checkpoints(program: Program) -> list[Path]:
    return sorted(program.home.glob("store/train/*/scratch/checkpoint-*.pt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "group"), [pytest.param(1, False, id="the run alone"), pytest.param(2, True, id="all processes at once")]
)
def test_told_to_stop_while_training(processes: int, group: bool, make_program: Callable[[], Program]) -> None:
    """SIGTERM to the run, or to all its processes as a batch system sends it, ends it within 30 s with a checkpoint of the
    last step; nobody is left, and the same command goes on from that step."""
    program = make_program()
    program.extra.update(PROXYROB_PROCESSES=str(processes), PROXYROB_WORKERS="1")
    changes = (*REAL_ONLY, f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "smooth.steps=20")
    command = ["run", str(program.preset), *(part for change in changes for part in ("--set", change))]
    running = program.start(*command, new_session=True)
    try:
        while not _checkpoints(program):
            assert running.poll() is None, running.communicate()[0]
            time.sleep(0.01)
        children = psutil.Process(running.pid).children(recursive=True)
        told = time.time()
        if group:
            os.killpg(running.pid, signal.SIGTERM)
        else:
            running.terminate()
        printed, _ = running.communicate(timeout=60)
    finally:
        if running.poll() is None:
            running.kill()
            running.communicate()
    assert time.time() - told < 30
    assert running.returncode == 130, printed
    assert "give the same command again and it goes on where it was" in printed
    assert "Traceback" not in printed
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    newest = _checkpoints(program)[-1]
    stopped = newest.stat().st_mtime
    assert stopped > told, "no checkpoint was written after the signal"
    done = program(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = plan_pipeline(load_config(str(program.preset), changes), program.home / "store")
    history = read_history(plan.variants["real-only"].train)
    assert history.step.iloc[-1] == STEPS
    assert (history[history.time_s > stopped].step > int(newest.stem.removeprefix("checkpoint-"))).all()
