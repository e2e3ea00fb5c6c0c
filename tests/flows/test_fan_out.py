"""Workers that share a stage and are not heard of."""

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterName
from prefect.client.schemas.objects import TaskRun
from prefect.futures import PrefectWrappedFuture
from prefect.task_runners import ThreadPoolTaskRunner

from flows.running.fan_out import share_out
from proxyrob.storage import Report, Stage

PATIENCE_S = 60.0


class Done(Report):
    """Of a stage without any work."""


class SilentCrew:
    """Two workers, of which one hangs and is given up, as one whose node is gone."""

    is_remote = True

    def __init__(self) -> None:
        self.runner = ThreadPoolTaskRunner[Any](max_workers=2)
        self.lost_may_end = threading.Event()
        self._first = threading.Lock()

    def size(self) -> int:
        return 2

    def describe(self) -> str:
        return "two workers"

    def placing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def cancel(self, future: PrefectWrappedFuture[Any, Any]) -> None:
        """Too late: it has begun."""

    def call(self, _function: Any, *, stage: Stage, **_given: Any) -> Done:
        """The one that comes first hangs, and has not said a word."""
        if self._first.acquire(blocking=False):
            assert self.lost_may_end.wait(PATIENCE_S)
            return Done()
        _await_states({"Running"}, of=2)
        return stage.finish(Done(), [], 0.0)


def _parts() -> list[TaskRun]:
    of_parts = TaskRunFilter(name=TaskRunFilterName(like_="silent "))
    with get_client(sync_client=True) as client:
        return client.read_task_runs(task_run_filter=of_parts)


def _await_states(wanted: set[str], of: int) -> None:
    """Wait until Prefect's server takes so many workers to be in these states."""
    deadline = time.monotonic() + PATIENCE_S
    while len(states := [part.state_name for part in _parts()]) != of or set(states) != wanted:
        assert time.monotonic() < deadline, states
        time.sleep(0.1)


@pytest.mark.usefixtures("prefect_server")
def test_a_worker_that_was_never_heard_of_is_not_running_for_ever(tmp_path: Path) -> None:
    """Its node was lost before it told anything; when the stage is whole Prefect's pages say that it is lost."""
    crew = SilentCrew()
    stage = Stage("stage", "a" * 64, tmp_path / "stage", {})
    stage.folder.mkdir()

    @flow
    def share() -> None:
        with crew.runner:
            share_out(
                crew,
                crew.call,
                stage,
                "silent",
                {},
                call=crew.call,
                threads=1,
                retry_condition=lambda *_: False,
                on_progress=lambda *_, **__: None,
            )
            _await_states({"Completed", "Crashed"}, of=2)
            crew.lost_may_end.set()

    share()
    assert stage.record() is not None
