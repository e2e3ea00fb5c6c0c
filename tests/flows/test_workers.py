"""Heavy work in a process of its own."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from flows.stages import PrioritySlots
from flows.workers import WorkerDied, run_in_child


def _square(value: int, on_progress: Callable[..., None]) -> tuple[int, int]:
    on_progress(1, 2, loss=0.5)
    return value * value, os.getpid()


def _refuse(on_progress: Callable[..., None]) -> None:
    raise ValueError("expected something else")


def _die(on_progress: Callable[..., None]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _ignore(done: int, total: int, **figures: float) -> None: ...


def test_result_and_progress_come_back() -> None:
    """The function runs in another process; its result and its progress arrive here."""
    told: list[Any] = []
    result, process = run_in_child(
        _square, threads=1, on_progress=lambda done, total, **figures: told.append((done, total, figures)), value=7
    )
    assert result == 49
    assert process != os.getpid()
    assert told == [(1, 2, {"loss": 0.5})]


def test_error_comes_back_with_its_traceback() -> None:
    """What the function raises is raised here, with the child's traceback as a note."""
    with pytest.raises(ValueError, match="expected something else") as caught:
        run_in_child(_refuse, threads=1, on_progress=_ignore)
    assert "in _refuse" in caught.value.__notes__[0]


def test_killed_child_is_noticed() -> None:
    """A child that is killed is an error that may be retried, and says how it ended."""
    with pytest.raises(WorkerDied, match="exit code -9"):
        run_in_child(_die, threads=1, on_progress=_ignore)


def test_slots_go_to_the_lowest_number_first() -> None:
    """Of those that wait for a worker, the one submitted first gets it; never more than there are slots."""
    slots, order, lock = PrioritySlots(1), [], threading.Lock()

    def work(priority: int) -> None:
        with slots.take(priority):
            with lock:
                order.append(priority)
            time.sleep(0.02)

    with slots.take(-1):
        threads = [threading.Thread(target=work, args=(priority,)) for priority in (5, 1, 3, 2, 4)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    assert order == [1, 2, 3, 4, 5]
