"""A flow run that starts again after its process was lost: how often it may, and what the earlier attempt left behind."""

from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, TaskRunFilter, TaskRunFilterState
from prefect.client.schemas.filters import TaskRunFilterStateType as StateTypes
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run
from prefect.states import Crashed

MOST_ATTEMPTS = 3
"""A crashed run of a deployment is scheduled again by an automation (``flows.stack.automations``), which cannot count."""

UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED]


def begin_attempt() -> None:
    """Close what a lost process of this run has left open.

    Raises ``RuntimeError`` in a run that was started more than ``MOST_ATTEMPTS`` times: it is failed then, and stays so.
    """
    if flow_run.run_count > 1:
        _close_lost_tasks()
    if flow_run.run_count > MOST_ATTEMPTS:
        raise RuntimeError(
            f"the process of this run was lost {MOST_ATTEMPTS} times (often because memory ran out): see the worker's log; "
            "what was finished is kept, and a new run goes on from it"
        )


def _close_lost_tasks() -> None:
    """Tasks of an earlier attempt would be Running on Prefect's pages for ever."""
    with get_client(sync_client=True) as client:
        of_run = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
        unfinished = TaskRunFilter(state=TaskRunFilterState(type=StateTypes(any_=UNFINISHED)))
        for task_run in client.read_task_runs(flow_run_filter=of_run, task_run_filter=unfinished):
            client.set_task_run_state(task_run.id, Crashed(message="the process of this attempt was lost"), force=True)
