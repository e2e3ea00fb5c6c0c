"""How often a flow run may start again after its process was lost."""

from prefect.runtime import flow_run

MOST_ATTEMPTS = 3
"""A crashed run of a deployment is scheduled again by an automation (``flows.stack.automations``), which cannot count."""


def refuse_further_attempts() -> None:
    """Raise ``RuntimeError`` in a run that was started more than ``MOST_ATTEMPTS`` times: it is failed then, and stays so."""
    if flow_run.run_count > MOST_ATTEMPTS:
        raise RuntimeError(
            f"the process of this run was lost {MOST_ATTEMPTS} times (often because memory ran out): see the worker's log; "
            "what was finished is kept, and a new run goes on from it"
        )
