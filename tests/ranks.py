"""What tests run in several processes. It imports little, because every one of them does."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from proxyrob.train import train_classifier
from proxyrob.types import OnProgress

FOREVER_S = 600.0


@dataclass(frozen=True)
class Job:
    """A training by its arguments; a stop is asked for in one process, when it has asked so many times."""

    arguments: dict[str, Any]
    stop: tuple[int, int] | None = None


@dataclass
class Outcome:
    """How a job ended in one process: what it returned or raised, what it told, how often it asked whether to stop."""

    value: Any
    error: str = ""
    told: list[int] = field(default_factory=list)
    asked: int = 0


def train_all(jobs: list[Job], device: str, should_stop: Callable[[], bool], on_progress: OnProgress) -> list[list[Outcome]]:
    """Train one after the other; the outcomes of each job by rank."""
    return [_train(job, device) for job in jobs]


def _train(job: Job, device: str) -> list[Outcome]:
    asked, told = [0], list[int]()

    def count() -> bool:
        asked[0] += 1
        return job.stop is not None and job.stop[0] == dist.get_rank() and asked[0] > job.stop[1]

    def tell(done: int, total: int, **figures: float) -> None:
        told.append(done)

    try:
        outcome = Outcome(train_classifier(**job.arguments, device=device, should_stop=count, on_progress=tell))
    except (ValueError, ArithmeticError, InterruptedError) as error:
        outcome = Outcome(type(error), str(error))
    outcome.told, outcome.asked = told, asked[0]
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    return outcomes


def wait_for_stop(device: str, should_stop: Callable[[], bool], on_progress: OnProgress) -> list[tuple[int, int, int]]:
    """Tell the process's number, wait until a stop is asked for; rank, number of processes and threads of each."""
    on_progress(os.getpid(), 0)
    while not should_stop():
        time.sleep(0.01)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (dist.get_rank(), dist.get_world_size(), torch.get_num_threads()))
    return found


def fail_in_the_second(how: str, device: str, should_stop: Callable[[], bool], on_progress: OnProgress) -> None:
    """The second process fails, after both have said who they are, while the first waits for it."""
    on_progress(os.getpid(), 0)
    dist.barrier()
    if dist.get_rank() == 0:
        dist.barrier()
    elif how == "error":
        raise KeyError("lost")
    elif how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(FOREVER_S)
