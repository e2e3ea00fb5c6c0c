"""A flow run that starts again after its process was lost."""

from uuid import UUID

import pytest
from prefect import flow, get_client, task
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run
from prefect.states import Running

from flows.running.attempts import MOST_ATTEMPTS, begin_attempt


@pytest.mark.usefixtures("prefect_server")
def test_a_run_is_started_again_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last attempt is made, one more fails for good, saying where to look."""

    @flow
    def attempt(count: int) -> None:
        monkeypatch.setattr(flow_run, "run_count", count, raising=False)
        begin_attempt()

    attempt(MOST_ATTEMPTS)
    with pytest.raises(RuntimeError, match=r"was lost 3 times .*: see the worker's log"):
        attempt(MOST_ATTEMPTS + 1)


@pytest.mark.usefixtures("prefect_server")
def test_tasks_of_a_lost_attempt_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was under way when the process was lost is Crashed, in this run alone; what was finished stays so."""

    @task
    def stage() -> None: ...

    @flow
    def begin(attempt: int) -> list[UUID]:
        stage()
        with get_client(sync_client=True) as client:
            made = [client.create_task_run(stage, flow_run.id, str(k), state=Running()).id for k in range(2)]
            monkeypatch.setattr(flow_run, "run_count", attempt, raising=False)
            begin_attempt()
            return made

    others, lost = begin(1), begin(2)
    with get_client(sync_client=True) as client:
        assert {client.read_task_run(task_run).state_type for task_run in others} == {StateType.RUNNING}
        assert {client.read_task_run(task_run).state_type for task_run in lost} == {StateType.CRASHED}
