"""Several processes that do the same work for the same place at the same moment, as workers on several machines do.

``python -m tests.at_once`` does the jobs that it reads from its input, one after the other. It forks the workers of each
after the imports, so that ten cost little more than one. A worker has a stage folder of its own, as on a machine of its own.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from proxyrob.config import JitterProxy, SamplingConfig
from proxyrob.label import label_shards
from proxyrob.proxy import sample_proxy
from proxyrob.storage import DataPlace
from proxyrob.types import OnProgress
from tests.toys import stage_in

JITTER = JitterProxy(num_images=120, sigma=0.3)
SAMPLING = SamplingConfig(shard_size=10, batch_size=4)
THRESHOLD = 0.9


@dataclass(frozen=True)
class Job:
    """``count`` workers that do ``work`` (``sample`` or ``label``) below ``folder`` at once, of which ``dead`` are killed."""

    work: str
    folder: str
    count: int
    dead: int = 0


def run_at_once(*jobs: Job) -> None:
    """Do each job in turn; raises when a worker that is not killed fails."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.at_once"],
        input=json.dumps([asdict(job) for job in jobs]),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def sample(folder: Path, home: Path, on_progress: OnProgress) -> None:
    """Sample into ``folder/images``."""
    sample_proxy(
        JITTER,
        SAMPLING,
        source=stage_in(folder, "source"),
        proxy=None,
        seed=0,
        stage=stage_in(home, "samples"),
        images=DataPlace.of(folder / "images"),
        on_progress=on_progress,
    )


def label(folder: Path, home: Path, on_progress: OnProgress) -> None:
    """Label ``folder/images`` into ``folder/labels``."""
    label_shards(
        THRESHOLD,
        source=stage_in(folder, "source"),
        images=DataPlace.of(folder / "images"),
        first=stage_in(folder, "train", model="cnn"),
        second=stage_in(folder, "train", model="resnet"),
        stage=stage_in(home, "labels"),
        labels=DataPlace.of(folder / "labels"),
        on_progress=on_progress,
    )


class _Dies:
    """Told of progress for the second time, it ends the process as ``kill -9`` does."""

    def __init__(self, *, dies: bool) -> None:
        self.dies, self.times_told = dies, 0

    def __call__(self, done: int, total: int, **figures: float) -> None:
        self.times_told += 1
        if self.dies and self.times_told == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def _work(job: Job) -> bool:
    """Whether every worker ended as it should."""
    work, folder = {"sample": sample, "label": label}[job.work], Path(job.folder)
    waiting, starting = os.pipe()
    workers = []
    for number in range(job.count):
        pid = os.fork()
        if pid == 0:
            os.close(starting)
            os.read(waiting, 1)  # nothing comes: it ends when the parent lets go of the other end
            work(folder, folder / f"home-{number}", _Dies(dies=number < job.dead))
            os._exit(0)
        workers.append(pid)
    os.close(starting)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
    return codes == [-signal.SIGKILL] * job.dead + [0] * (job.count - job.dead)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(not all(_work(Job(**job)) for job in json.load(sys.stdin)))
