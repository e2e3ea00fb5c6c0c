"""The program as a user runs it: the console command, in a process of its own, with an empty home."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flows.plan import Plan, plan_pipeline
from flows.records.tracking import Tracker
from flows.settings import Settings
from proxyrob.config import load_config

NAME = "digits-linf"
COMMAND = str(Path(sys.executable).with_name("proxyrob"))

TINY = """\
# The whole path in seconds: weak networks, few images, every stage real.
extends: digits
name: tiny
threat: linf:0.1
source: {num_train: 60, num_validation: 30, num_test: 40}
proxy: {steps: 1100, width: 128, num_images: 400, sampler_steps: 10}
sampling: {shard_size: 100, batch_size: 100}
label:
  first: {steps: 120}
  second: {steps: 200}
model: {kind: cnn, widths: [8, 16]}
train: {steps: 120, batch_size: 32, checkpoint_every: 20, objective: {kind: pgd, attack_steps: 3}}
smooth: {steps: 60, batch_size: 32, checkpoint_every: 20}
evaluate: {pgd_steps: 5, batch_size: 20}
certify: {num_images: 40, n: 500, radii: [0.0, 0.25]}
"""


@dataclass(frozen=True)
class Program:
    """``proxyrob`` with one home."""

    home: Path
    preset: Path
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        left_out = ("PREFECT", "MLFLOW", "PROXYROB", "AWS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        return {**kept, "PROXYROB_HOME": str(self.home), "COLUMNS": "120", "HOME": str(self.home), **self.extra}

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [COMMAND, *arguments], env=self.environment | environment, capture_output=True, text=True, timeout=300, check=False
        )

    def start(self, *arguments: str, new_session: bool = False) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [COMMAND, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=new_session,
        )

    def report(self, output: Path) -> dict[str, Any]:
        return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="session")
def make_program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Program]:
    """A program with a home of its own that is empty."""

    def make() -> Program:
        home = tmp_path_factory.mktemp("home")
        preset = home / "tiny.yaml"
        preset.write_text(TINY)
        return Program(home, preset)

    return make


@dataclass(frozen=True)
class Finished:
    """A program whose first run has finished."""

    program: Program
    output: Path
    printed: str

    @property
    def report(self) -> dict[str, Any]:
        return self.program.report(self.output)


@pytest.fixture(scope="session")
def finished(make_program: Callable[[], Program]) -> Finished:
    """One whole run of the tiny preset."""
    program = make_program()
    output = program.home / "output"
    done = program("run", str(program.preset), "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(program, output, done.stdout)


@dataclass(frozen=True)
class Record:
    """A copy of the finished run's MLflow store, and its plan."""

    tracker: Tracker
    plan: Plan
    run_id: str

    def aliases(self) -> dict[str, str]:
        return {alias: str(version) for alias, version in self.tracker.client.get_registered_model(NAME).aliases.items()}


@pytest.fixture
def record(finished: Finished, tmp_path: Path) -> Record:
    """The finished run's record, to be written to without disturbing other tests; version 1 is made champion."""
    home = finished.program.home
    shutil.copytree(home / "mlflow", tmp_path / "mlflow")
    tracker = Tracker(Settings(home=tmp_path))
    plan = plan_pipeline(load_config(str(finished.output / "configuration.yaml")), home / "store")
    tracker.client.set_registered_model_alias(NAME, "champion", "1")
    run_id = tracker.client.get_model_version(NAME, "1").run_id
    assert run_id is not None
    return Record(tracker, plan, run_id)
