"""Several processes that do the same work for the same place at the same moment, as workers on several machines do.

``python -m tests.at_once`` does the jobs that it reads from its input, one after the other. It forks the workers of each
after the imports, so that ten cost little more than one. Those that sample and label have a stage folder of their own, as on
machines of their own; those that attack and certify share one. What each does is noted in ``FOLDER/units``.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from proxyrob.certify import certify_classifier, smoothing
from proxyrob.config import JitterProxy, SamplingConfig
from proxyrob.evaluate import evaluate_classifier
from proxyrob.label import label_shards
from proxyrob.proxy import sample_proxy
from proxyrob.storage import DataPlace
from tests.counting import count_units
from tests.toys import SMALL_CERTIFY, SMALL_EVALUATE, SMALL_SIGMA, SMALL_THREAT, stage_in

JITTER = JitterProxy(num_images=120, sigma=0.3)
SAMPLING = SamplingConfig(shard_size=10, batch_size=4)
THRESHOLD = 0.9


@dataclass(frozen=True)
class Job:
    """``count`` workers that do ``work`` (a key of ``WORK``) below ``folder`` at once; ``dead`` die in their first unit."""

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


def sample(folder: Path, home: Path) -> None:
    """Sample into ``folder/images``."""
    sample_proxy(
        JITTER,
        SAMPLING,
        source=stage_in(folder, "source"),
        proxy=None,
        seed=0,
        stage=stage_in(home, "samples"),
        images=DataPlace.of(folder / "images"),
    )


def label(folder: Path, home: Path) -> None:
    """Label ``folder/images`` into ``folder/labels``."""
    label_shards(
        THRESHOLD,
        source=stage_in(folder, "source"),
        images=DataPlace.of(folder / "images"),
        first=stage_in(folder, "train", model="cnn"),
        second=stage_in(folder, "train", model="resnet"),
        stage=stage_in(home, "labels"),
        labels=DataPlace.of(folder / "labels"),
    )


def attack(folder: Path, _home: Path) -> None:
    """Attack a classifier, all in ``folder/evaluate``."""
    evaluate_classifier(
        SMALL_EVALUATE,
        source=stage_in(folder, "source"),
        model=stage_in(folder, "train", model="cnn"),
        threat=SMALL_THREAT,
        seed=0,
        stage=stage_in(folder, "evaluate"),
    )


def certify(folder: Path, _home: Path) -> None:
    """Certify a classifier, all in ``folder/certify``."""
    certify_classifier(
        SMALL_CERTIFY,
        sigma=SMALL_SIGMA,
        source=stage_in(folder, "source"),
        model=stage_in(folder, "train", model="cnn"),
        seed=0,
        stage=stage_in(folder, "certify"),
    )


WORK = {"sample": sample, "label": label, "attack": attack, "certify": certify}


def _work(job: Job) -> bool:
    """Whether every worker ended as it should."""
    folder = Path(job.folder)
    waiting, starting = os.pipe()
    workers = []
    for number in range(job.count):
        pid = os.fork()
        if pid == 0:
            os.close(starting)
            count_units(folder / "units", dies=number < job.dead)
            os.read(waiting, 1)  # nothing comes: it ends when the parent lets go of the other end
            WORK[job.work](folder, folder / f"home-{number}")
            os._exit(0)
        workers.append(pid)
    os.close(starting)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
    return codes == [-signal.SIGKILL] * job.dead + [0] * (job.count - job.dead)


if __name__ == "__main__":
    torch.set_num_threads(1)
    smoothing.UNIT_SIZE["fixed"] = 2
    sys.exit(not all(_work(Job(**job)) for job in json.load(sys.stdin)))
