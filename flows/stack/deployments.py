"""What a Prefect server is told of us: work pools, deployments with their schedules and forms, automations, whom to notify.

``deployments/prefect.yaml`` says it, ``proxyrob deploy`` applies it, as often as one likes.
"""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import yaml
from prefect import Flow
from prefect.automations import AutomationCore
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import ConcurrencyOptions
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.types import SecretDict
from prefect.workers.process import ProcessWorker
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import flows
from flows.parameters import build_form
from flows.stack.automations import list_automations
from flows.stack.services import TAG

FILE = "prefect.yaml"
WEBHOOK = "proxyrob"


class Entry(BaseModel):
    """A part of the file: strict, so that a misspelt key is an error and not a setting without effect."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Pool(Entry):
    """A work pool and how many of its runs there may be at once."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    type: Literal["process"]
    description: str
    concurrency_limit: Annotated[int, Field(gt=0)]


class Schedule(Entry):
    """When a deployment runs by itself; ``active`` is what a server is told the first time."""

    slug: str
    cron: str
    timezone: str
    active: bool
    parameters: dict[str, Any] = {}


class Limit(Entry):
    """How many runs of a deployment there may be at once, and what becomes of one more."""

    limit: Annotated[int, Field(gt=0)]
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"]


class PoolName(Entry):
    """Prefect's way of naming a work pool."""

    name: str


class Deployment(Entry):
    """A flow with its parameters, on a pool."""

    name: str
    description: str
    entrypoint: Annotated[str, Field(pattern=r"^flows\.\w+\.\w+$")]
    parameters: dict[str, Any]
    tags: tuple[str, ...]
    concurrency_limit: Limit
    work_pool: PoolName
    schedules: tuple[Schedule, ...] = ()

    def load_flow(self) -> Flow[..., Any]:
        """The flow itself. Raises ``ValueError`` where the entrypoint names none."""
        module, _, name = self.entrypoint.rpartition(".")
        found = getattr(import_module(module), name, None)
        if not isinstance(found, Flow):
            raise ValueError(f"deployment {self.name!r}: {self.entrypoint} is no flow")  # noqa: TRY004  (the file is wrong)
        return found


class Deployments(Entry):
    """The whole file."""

    name: str
    work_pools: tuple[Pool, ...]
    deployments: tuple[Deployment, ...]


class Applied(Entry):
    """What was applied, for the terminal."""

    pools: tuple[str, ...]
    deployments: tuple[str, ...]
    schedules: dict[str, bool]
    automations: tuple[str, ...]


def default_file() -> Path:
    """The file of the checkout, or the copy that is installed with the program."""
    package = Path(flows.__file__).parent
    beside = package.parent / "deployments" / FILE
    return beside if beside.is_file() else package / FILE


def read_deployments(path: Path) -> Deployments:
    """Read and check the file: every pool, flow, parameter and tag that it names is there.

    Raises ``ValueError`` saying what does not fit, ``OSError`` when it cannot be read.
    """
    try:
        read = Deployments.model_validate(yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    pools = {pool.name for pool in read.work_pools}
    for deployment in read.deployments:
        if deployment.work_pool.name not in pools:
            raise ValueError(
                f"{path}: deployment {deployment.name!r} needs the work pool {deployment.work_pool.name!r}; "
                f"there are {', '.join(sorted(pools))}"
            )
        if TAG not in deployment.tags:
            raise ValueError(
                f"{path}: deployment {deployment.name!r} lacks the tag {TAG!r}, by which automations know our runs"
            )
        for parameters in ({}, *(schedule.parameters for schedule in deployment.schedules)):
            deployment.load_flow().validate_parameters({**deployment.parameters, **parameters})
    return read


async def apply_deployments(read: Deployments, *, schedules: bool | None = None, notify_url: str | None = None) -> Applied:
    """Make the server at ``PREFECT_API_URL`` say what the file says; what it has of others is left alone.

    ``notify_url`` is a webhook that takes ``{"text": …}``, as chat programs have them: failed runs and changes of champion are
    told there. Without it nobody is told, unless the server was given one before. A schedule keeps the switch it has on the
    server, unless ``schedules`` sets them all, and a pool its limit. A pool of another type (Kubernetes) that has our name is
    kept, with its own template.
    """
    switched: dict[str, bool] = {}
    async with get_client() as client:
        limits = {pool.name: await _apply_pool(client, pool) for pool in read.work_pools}
        for deployment in read.deployments:
            switched |= await _apply_deployment(client, deployment, schedules)
        automations = await _apply_automations(client, await _apply_webhook(client, notify_url))
    return Applied(
        pools=tuple(f"{name} (at most {limit} at once)" for name, limit in limits.items()),
        deployments=tuple(f"{deployment.load_flow().name}/{deployment.name}" for deployment in read.deployments),
        schedules=switched,
        automations=automations,
    )


async def _apply_pool(client: PrefectClient, pool: Pool) -> int:
    """Returns how many of its runs there may be at once."""
    try:
        there = await client.read_work_pool(pool.name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        await client.create_work_pool(
            WorkPoolCreate(
                name=pool.name,
                type=pool.type,
                description=pool.description,
                concurrency_limit=pool.concurrency_limit,
                base_job_template=template,
            )
        )
        return pool.concurrency_limit
    limit = pool.concurrency_limit if there.concurrency_limit is None else there.concurrency_limit
    await client.update_work_pool(pool.name, WorkPoolUpdate(description=pool.description, concurrency_limit=limit))
    return limit


async def _apply_deployment(client: PrefectClient, deployment: Deployment, switch: bool | None) -> dict[str, bool]:
    flow = deployment.load_flow()
    full_name = f"{flow.name}/{deployment.name}"
    try:
        known = await client.read_deployment_by_name(full_name)
        active = {schedule.slug: schedule.active for schedule in known.schedules}
    except ObjectNotFound:
        active = {}
    wanted = {
        schedule.slug: active.get(schedule.slug, schedule.active) if switch is None else switch
        for schedule in deployment.schedules
    }
    await client.create_deployment(
        flow_id=await client.create_flow(flow),
        name=deployment.name,
        description=deployment.description,
        entrypoint=deployment.entrypoint,
        parameters=deployment.parameters,
        parameter_openapi_schema=build_form(flow.fn),
        enforce_parameter_schema=True,
        tags=list(deployment.tags),
        work_pool_name=deployment.work_pool.name,
        concurrency_limit=deployment.concurrency_limit.limit,
        concurrency_options=ConcurrencyOptions.model_validate(
            {"collision_strategy": deployment.concurrency_limit.collision_strategy}
        ),
        schedules=[
            DeploymentScheduleCreate(
                schedule=CronSchedule(cron=schedule.cron, timezone=schedule.timezone),
                slug=schedule.slug,
                parameters=schedule.parameters,
                active=wanted[schedule.slug],
            )
            for schedule in deployment.schedules
        ],
        pull_steps=[],
    )
    return {f"{full_name} {slug}": on for slug, on in wanted.items()}


async def _apply_webhook(client: PrefectClient, url: str | None) -> UUID | None:
    """The block that notifies people: Prefect keeps it, its address encrypted."""
    if url is not None:
        block = CustomWebhookNotificationBlock(
            name=WEBHOOK,
            url="{{url}}",
            secrets=SecretDict({"url": url}),
            json_data={"text": "{{subject}}\n{{body}}"},
            headers=None,
            cookies=None,
        )
        return await block.asave(WEBHOOK, overwrite=True)
    try:
        return (await client.read_block_document_by_name(WEBHOOK, CustomWebhookNotificationBlock.get_block_type_slug())).id
    except ObjectNotFound:
        return None


async def _apply_automations(client: PrefectClient, notify: UUID | None) -> tuple[str, ...]:
    names = []
    for automation in list_automations(notify):
        known = await client.read_automations_by_name(automation.name)
        if not known:
            await client.create_automation(automation)
        for first in known[:1]:
            wanted = automation.model_copy(update={"enabled": first.enabled})
            if wanted.model_dump() != AutomationCore.model_validate(first.model_dump()).model_dump():
                await client.update_automation(first.id, wanted)  # which forgets the runs it has an eye on
        for copy in known[1:]:
            await client.delete_automation(copy.id)
        names.append(automation.name)
    return tuple(names)
