"""Schedules that are switched on start runs."""

import asyncio
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from prefect import get_client
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
