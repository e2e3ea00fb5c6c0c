"""Schedules that are switched on start runs."""

import asyncio
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

from flows.stack.deployments import apply_deployments, default_file, read_deployments


@pytest.mark.usefixtures("prefect_server")
def test_a_schedule_makes_runs() -> None:
    """What the scheduler of Prefect's server does at each turn gives runs of the coming weeks, with their parameters."""

    async def schedule() -> list[tuple[str | None, object]]:
        await apply_deployments(read_deployments(default_file()), schedules=True)
        async with get_client() as client:
            deployment = await client.read_deployment_by_name("proxyrob/digits")
            async with httpx.AsyncClient(base_url=str(client.api_url)) as http:
                until = datetime.now(UTC) + timedelta(days=15)
                answer = await http.post(f"deployments/{deployment.id}/schedule", json={"end_time": until.isoformat()})
                answer.raise_for_status()
            ours = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
            runs = await client.read_flow_runs(deployment_filter=ours)
            return [(run.state_name, run.parameters.get("weekly_seed")) for run in runs]

    assert set(asyncio.run(schedule())) == {("Scheduled", True)}


@pytest.mark.usefixtures("prefect_server")
def test_what_a_site_has_set_stays() -> None:
    """A pool that was given more slots keeps them, and a schedule its switch, when everything is applied again."""

    async def apply_twice() -> tuple[int | None, list[bool], tuple[str, ...]]:
        read = read_deployments(default_file())
        await apply_deployments(read, schedules=True)
        async with get_client() as client:
            await client.update_work_pool("gpu", WorkPoolUpdate(concurrency_limit=4))
            applied = await apply_deployments(read)
            limit = (await client.read_work_pool("gpu")).concurrency_limit
        return limit, list(applied.schedules.values()), applied.pools

    limit, switched, pools = asyncio.run(apply_twice())
    assert limit == 4
    assert all(switched)
    assert "gpu (at most 4 at once)" in pools
