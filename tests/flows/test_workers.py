"""Heavy work in a process of its own."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import TaskRun
from prefect.states import Failed

from flows.running import workers
from flows.running.fan_out import do_part
from flows.running.slots import PrioritySlots
from flows.running.stages import is_transient, run_stage
from flows.running.workers import Stopped, WorkerDied, run_in_child
from proxyrob.errors import NonFiniteLoss, OutOfMemory, SourceUnavailable

ABOUT: dict[str, Any] = {"task_key": "stage", "dynamic_key": "0"}


def _square(value: int, on_progress: Callable[..., None]) -> tuple[int, int]:
    on_progress(1, 2, loss=0.5)
    return value * value, os.getpid()


def _refuse(on_progress: Callable[..., None]) -> None:
    raise ValueError("expected something else")


def _die(on_progress: Callable[..., None]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop_in_order(note: Path, should_stop: Callable[[], bool], on_progress: Callable[..., None]) -> None:
    on_progress(os.getpid(), 0)
    while not should_stop():
        time.sleep(0.01)
    on_progress(os.getpid(), 1)
    note.write_text("how far it was")
    raise InterruptedError("asked to stop")


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


def test_sigterm_stops_a_child_in_order(tmp_path: Path) -> None:
    """A stoppable function that is told to end does so by itself, and is not tried again."""
    note = tmp_path / "note"

    def terminate(done: int, total: int, **figures: float) -> None:
        if total == 0:
            os.kill(done, signal.SIGTERM)

    with pytest.raises(InterruptedError, match="asked to stop") as caught:
        run_in_child(_stop_in_order, threads=1, on_progress=terminate, stoppable=True, note=note)
    assert note.read_text() == "how far it was"
    unused: Any = None
    assert not is_transient(unused, TaskRun(run_count=1, **ABOUT), Failed(data=caught.value))


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (WorkerDied("killed"), 3),
        (ChildProcessError("killed"), 3),
        (SourceUnavailable("no answer"), 100),
        (ConnectionError("refused"), 100),
        (ValueError("wrong configuration"), 1),
        (OutOfMemory("no room for one image"), 1),
        (NonFiniteLoss("diverged"), 1),
        (Stopped("interrupted"), 1),
    ],
)
def test_what_is_tried_again(error: Exception, tries: int) -> None:
    """A server or a store that is away as long as there are tries, a death twice, whatever would only fail again never."""
    unused: Any = None
    again = [is_transient(unused, TaskRun(run_count=count, **ABOUT), Failed(data=error)) for count in range(1, 100)]
    assert again == [count < tries for count in range(1, 100)]


def test_tries_outlast_a_store_that_is_started_again() -> None:
    """For two minutes or more, with longer and longer waits, those of a stage as those of a part of one."""
    for work in (run_stage, do_part):
        delays = work.retry_delay_seconds
        assert isinstance(delays, list)
        assert work.retries == len(delays)
        assert sum(delays) * (1 - (work.retry_jitter_factor or 0)) > 120
        assert delays == sorted(delays)


def test_a_stopping_run_waits_for_what_its_children_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the run is interrupted a stoppable child writes down how far it is before ``Stopped`` is raised."""
    note, stopping = tmp_path / "note", threading.Event()
    monkeypatch.setattr(workers, "stopping", stopping)
    with pytest.raises(Stopped):
        run_in_child(_stop_in_order, threads=1, on_progress=lambda *_, **__: stopping.set(), stoppable=True, note=note)
    assert note.read_text() == "how far it was"


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
