"""What the Prefect server does by itself about runs of our deployments: mark those that died, and start them again."""

from typing import Any

from prefect.automations import AutomationCore

from flows.running.attempts import MOST_ATTEMPTS
from flows.stack.services import HEARTBEAT_S, TAG

RUN, CHANGE = "prefect.flow-run", "change-flow-run-state"
ALIVE, CRASHED = f"{RUN}.heartbeat", f"{RUN}.Crashed"
ENDED = {f"{RUN}.{state}" for state in ("Completed", "Failed", "Cancelled", "Cancelling", "AwaitingRetry", "Suspended")}
LOST_AFTER_S = 3 * HEARTBEAT_S
RESTART_AFTER_S = 60
"""A worker reports the same crash twice, up to 45 s apart: the second report must not hit the run that was started again."""


def list_automations() -> tuple[AutomationCore, ...]:
    """All automations, by names that stay the same."""
    lost = {
        "name": "proxyrob: mark a run crashed when its heartbeat is lost",
        "description": f"A run whose worker died, too, would be Running for ever: it is Crashed after {LOST_AFTER_S} s.",
        "trigger": _silence_after(ALIVE, {ALIVE, CRASHED, *ENDED}, LOST_AFTER_S),
        "actions": [{"type": CHANGE, "state": "CRASHED", "message": f"no heartbeat for {LOST_AFTER_S} s"}],
    }
    again = {
        "name": "proxyrob: start a crashed run again",
        "description": f"The same run goes on from its checkpoints. After {MOST_ATTEMPTS} attempts it fails by itself.",
        "trigger": _silence_after(CRASHED, {f"{RUN}.Pending", f"{RUN}.Running", *ENDED}, RESTART_AFTER_S),
        "actions": [
            {
                "type": CHANGE,
                "state": "SCHEDULED",
                "name": "AwaitingRetry",
                "message": "started again, because its process was lost",
            }
        ],
    }
    return tuple(AutomationCore.model_validate(automation) for automation in (lost, again))


def _silence_after(event: str, expected: set[str], seconds: int) -> dict[str, Any]:
    """For each run of ours: none of the expected events within so long after the first one."""
    return {
        "type": "event",
        "after": {event},
        "expect": expected,
        "match": {"prefect.resource.id": f"{RUN}.*"},
        "match_related": {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"},
        "for_each": {"prefect.resource.id"},
        "posture": "Proactive",
        "threshold": 1,
        "within": seconds,
    }
