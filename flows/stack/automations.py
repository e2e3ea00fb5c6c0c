"""What the Prefect server does by itself about runs of our deployments: mark those that died, start them again, tell people."""

from typing import Any, get_args
from uuid import UUID

from prefect.automations import AutomationCore

from flows.records.champions import ChangeName
from flows.release import CHAMPION_EVENT
from flows.running.attempts import MOST_ATTEMPTS
from flows.stack.services import HEARTBEAT_S, TAG

RUN, CHANGE = "prefect.flow-run", "change-flow-run-state"
ALIVE, CRASHED = f"{RUN}.heartbeat", f"{RUN}.Crashed"
ENDED = {f"{RUN}.{state}" for state in ("Completed", "Failed", "Cancelled", "Cancelling", "AwaitingRetry", "Suspended")}
_OURS = {
    "match": {"prefect.resource.id": f"{RUN}.*"},
    "match_related": {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"},
    "for_each": {"prefect.resource.id"},
}
"""Each run of our deployments by itself."""

LOST_AFTER_S = 3 * HEARTBEAT_S
RESTART_AFTER_S = 60
"""A worker reports the same crash twice, up to 45 s apart: the second report must not hit the run that was started again."""


def list_automations(notify: UUID | None = None) -> tuple[AutomationCore, ...]:
    """All automations, by names that stay the same; those that tell people where ``notify`` is the block that does it."""
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
    told = [] if notify is None else [_tell_of_failures(notify), _tell_of_champions(notify)]
    return tuple(AutomationCore.model_validate(automation) for automation in (lost, again, *told))


def _tell_of_failures(notify: UUID) -> dict[str, Any]:
    return {
        "name": "proxyrob: tell when a run fails",
        "description": "One that crashed is started again first, and has failed when that was in vain.",
        "trigger": {"type": "event", "expect": {f"{RUN}.Failed"}, **_OURS, "posture": "Reactive", "threshold": 1, "within": 0},
        "actions": [
            {
                "type": "send-notification",
                "block_document_id": notify,
                "subject": "{{ flow.name }} {{ flow_run.name }} has failed",
                "body": "{{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
            }
        ],
    }


def _tell_of_champions(notify: UUID) -> dict[str, Any]:
    expected = {f"{CHAMPION_EVENT}.{change}" for change in get_args(ChangeName)}
    return {
        "name": "proxyrob: tell when the champion changes",
        "description": "A version was promoted, or withdrawn because its figure fell.",
        "trigger": {"type": "event", "expect": expected, "posture": "Reactive", "threshold": 1, "within": 0},
        "actions": [
            {
                "type": "send-notification",
                "block_document_id": notify,
                "subject": "{{ event.resource['prefect.resource.name'] }} version {{ event.payload.version }} "
                "{{ 'is champion' if event.event.endswith('promoted') else 'is champion no longer' }}",
                "body": "{{ event.payload.reason }}",
            }
        ],
    }


def _silence_after(event: str, expected: set[str], seconds: int) -> dict[str, Any]:
    """For each run of ours: none of the expected events within so long after the first one."""
    return {
        "type": "event",
        "after": {event},
        "expect": expected,
        **_OURS,
        "posture": "Proactive",
        "threshold": 1,
        "within": seconds,
    }
