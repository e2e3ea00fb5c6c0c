"""What Prefect is told of us, as far as that is known without a server."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.schedules import CronSchedule

from flows.parameters import build_form, week_of
from flows.stack.automations import list_automations
from flows.stack.deployments import default_file, read_deployments
from flows.stack.services import HEARTBEAT_S, POOLS

SHIPPED = read_deployments(default_file())


def test_every_part_has_a_deployment() -> None:
    """The pipeline, each of its parts and the nightly evaluation can be started from Prefect's pages, on our pools."""
    flows = {deployment.load_flow().name for deployment in SHIPPED.deployments}
    assert flows == {"proxyrob", "proxyrob-data", "proxyrob-train", "proxyrob-assess", "proxyrob-nightly"}
    assert {pool.name for pool in SHIPPED.work_pools} == set(POOLS)


@pytest.mark.parametrize("deployment", SHIPPED.deployments, ids=lambda deployment: deployment.name)
def test_parameters_are_forms(deployment: Any) -> None:
    """Each parameter has a title and a description for people, beside its type."""
    for name, field in build_form(deployment.load_flow().fn)["properties"].items():
        assert field["title"] != name
        assert len(field["description"]) > 10


def test_bounds_are_part_of_the_form() -> None:
    """What is out of bounds is refused by the server before a run exists."""
    form = build_form(next(d for d in SHIPPED.deployments if d.name == "champion").load_flow().fn)["properties"]
    assert (form["restarts"]["minimum"], form["restarts"]["maximum"]) == (1, 20)


def test_schedules_ship_switched_off() -> None:
    """Nothing runs by itself until somebody switches it on; every cron line can be read."""
    schedules = {schedule.slug: schedule for deployment in SHIPPED.deployments for schedule in deployment.schedules}
    assert set(schedules) == {"weekly", "nightly"}
    for schedule in schedules.values():
        assert not schedule.active
        CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
    assert schedules["weekly"].parameters == {"weekly_seed": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entrypoint": "flows.pipeline.absent"}, "flows.pipeline.absent is no flow"),
        ({"work_pool": {"name": "tpu"}}, "needs the work pool 'tpu'; there are cpu, gpu"),
        ({"tags": ["mine"]}, "lacks the tag 'proxyrob'"),
        ({"concurency_limit": 1}, "Extra inputs are not permitted"),
        ({"parameters": {"preset": ""}}, "at least 1 character"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """A misspelt key, a missing flow or pool, a parameter out of bounds: all are found before anything is applied."""
    content = yaml.safe_load(default_file().read_text())
    content["deployments"][0] |= change
    path = tmp_path / "prefect.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(Exception, match=message):
        read_deployments(path)


def test_automations_wait_longer_than_a_heartbeat() -> None:
    """A run is lost only after several heartbeats are missing; one that crashed is scheduled again, and counts by itself."""
    lost, again = (automation.model_dump(mode="json") for automation in list_automations())
    assert lost["trigger"]["within"] >= 3 * HEARTBEAT_S
    assert lost["actions"][0]["state"] == "CRASHED"
    assert again["actions"][0] | {"message": None} == {
        "type": "change-flow-run-state",
        "state": "SCHEDULED",
        "name": "AwaitingRetry",
        "message": None,
        "force": False,
    }


def test_a_week_has_one_seed() -> None:
    """Year and calendar week: the same from Monday to Sunday, another one in the next week, also around New Year."""
    assert week_of(datetime(2026, 11, 23, tzinfo=UTC)) == week_of(datetime(2026, 11, 29, tzinfo=UTC)) == 202648
    assert week_of(datetime(2027, 1, 3, tzinfo=UTC)) == 202653
    assert week_of(datetime(2027, 1, 4, tzinfo=UTC)) == 202701
