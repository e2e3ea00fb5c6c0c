"""What may be wrong with a stack, and what to do about each: read only, nothing is mended."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

from packaging.requirements import Requirement

from flows.settings import Settings, hide_credentials
from flows.stack.answers import Answer, ask, credentials_of
from flows.stack.processes import find_listener, find_marks
from flows.stack.services import HEARTBEAT_S, POOLS, TAG
from flows.stack.state import State, pools_of, read_state
from proxyrob.storage import open_store

SILENT_AFTER_S = 4 * HEARTBEAT_S
"""One heartbeat more than the automation waits for, which has had its turn then."""
LEAST_ROOM_GB = 5.0
UNFINISHED = ("RUNNING", "PENDING", "CANCELLING")
Outcome = Literal["fine", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``remedy`` says what to do about a problem."""

    outcome: Outcome
    subject: str
    finding: str
    remedy: str = ""


@dataclass(frozen=True)
class Surroundings:
    """What is examined: the environment, and the stack of this host if there is one."""

    settings: Settings
    environment: Mapping[str, str]
    state: State | None

    @property
    def prefect_api(self) -> str | None:
        given = self.environment.get("PREFECT_API_URL")
        return given or (f"{self.state.prefect_url}/api" if self.state else None)

    @property
    def mlflow(self) -> str | None:
        given = self.settings.tracking_uri
        return given if given and given.startswith("http") else self.state.mlflow_url if self.state and not given else None

    def ask_prefect(self, path: str, body: object = None) -> Answer:
        return ask(f"{self.prefect_api}/{path}", body, credentials=credentials_of(self.environment, "prefect"))


def examine(settings: Settings, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Look at everything in turn."""
    try:
        state = read_state(settings)
    except ValueError as error:
        yield Finding("problem", "stack", str(error), "see above")
        state = None
    around = Surroundings(settings, environment, state)
    for check in CHECKS:
        yield from check(around)


def check_processes(around: Surroundings) -> Iterator[Finding]:
    """Whether the recorded processes run, and whether others of a stack do that nobody looks after."""
    state = around.state
    if state is None:
        yield Finding("note", "stack", f"none is running below {around.settings.home.absolute()}", "proxyrob up")
    elif state.supervisor.find() is None:
        yield Finding(
            "problem", "supervisor", "has died; what it started goes on unattended", "proxyrob down, then proxyrob up"
        )
    else:
        yield Finding("fine", "supervisor", f"process {state.supervisor.pid}")
    for part in state.parts if state else ():
        running = part.process is not None and part.process.find() is not None
        if part.condition == "done" or (running and part.condition == "ready"):
            again = f", started again {part.restarts} times" if part.restarts else ""
            yield Finding("note" if again else "fine", part.name, f"{part.condition}{again}")
        elif running or part.condition == "waiting":
            yield Finding("note", part.name, part.condition, "wait, or read its log (proxyrob status names it)")
        else:
            yield Finding("problem", part.name, part.fault or "has ended", "read its log (proxyrob status names it)")
    strangers = [pid for pid, mark in find_marks().items() if state is None or mark != state.mark]
    if strangers:
        listed = ", ".join(map(str, sorted(strangers)))
        yield Finding(
            "note",
            "other stacks",
            f"processes {listed} belong to another stack",
            "set PROXYROB_HOME to its home: proxyrob status",
        )


def check_ports(around: Surroundings) -> Iterator[Finding]:
    """Who has the ports of the stack, or would be in its way."""
    state = around.state
    for name, port in (("Prefect", state.prefect_port if state else 4200), ("MLflow", state.mlflow_port if state else 5000)):
        holder = find_listener(port)
        if state is None and holder is not None:
            option = f"--{name.lower()}-port"
            yield Finding("note", f"port {port}", f"taken by {holder}", f"proxyrob up {option} 0 takes another for {name}")
        elif state is not None:
            yield Finding("fine" if holder else "note", f"port {port}", f"{name}: {holder or 'nobody listens yet'}")


def check_servers(around: Surroundings) -> Iterator[Finding]:
    """Whether both servers answer, let us in, and fit to this program."""
    if around.prefect_api is None:
        yield Finding("note", "Prefect", "PREFECT_API_URL is not set: runs start a server of their own")
    else:
        answer = around.ask_prefect("admin/version")
        subject = f"Prefect at {around.prefect_api}"
        yield _judge(subject, answer, "prefect", "PREFECT_API_URL", "set PREFECT_API_AUTH_STRING to user:password")
    if around.mlflow is None:
        yield Finding(
            "note",
            "MLflow",
            f"no server is set: the store is {around.settings.resolved_tracking_uri.partition('@')[2] or 'embedded'}",
        )
    else:
        answer = ask(f"{around.mlflow}/version", credentials=credentials_of(around.environment, "mlflow"))
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        yield _judge(f"MLflow at {hide_credentials(around.mlflow)}", answer, "mlflow", "PROXYROB_TRACKING_URI", remedy)


def _judge(subject: str, answer: Answer, package: str, variable: str, remedy: str) -> Finding:
    ours = version(package)
    if answer.status is None:
        return Finding("problem", subject, f"does not answer: {answer.content}", f"proxyrob up, or correct {variable}")
    if answer.status == 401:
        return Finding("problem", subject, "refuses our credentials", remedy)
    if answer.status == 403 and package == "mlflow":
        return Finding(
            "problem",
            subject,
            "refuses the name it is called by",
            "add it, with and without port, to MLFLOW_SERVER_ALLOWED_HOSTS",
        )
    if not answer.is_good:
        return Finding("problem", subject, f"answers with {answer.status}", f"correct {variable}: that may be another program")
    theirs = str(answer.content)
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        return Finding(
            "problem", subject, f"has version {theirs}, here is {ours}", "install the same requirements.lock on both"
        )
    return Finding("fine", subject, f"version {theirs}")


def check_deployments(around: Surroundings) -> Iterator[Finding]:
    """Whether the server knows our pools and deployments, and whether a worker takes their work."""
    if around.prefect_api is None or not around.ask_prefect("health").is_good:
        return
    found = around.ask_prefect("deployments/filter", {"deployments": {"tags": {"all_": [TAG]}}})
    names = [deployment["name"] for deployment in found.content] if found.is_good else []
    if not names:
        yield Finding("problem", "deployments", "the server has none of ours", "proxyrob deploy")
        return
    yield Finding("fine", "deployments", ", ".join(sorted(names)))
    automations = around.ask_prefect("automations/filter", {})
    if automations.is_good and not any(known["name"].startswith("proxyrob:") for known in automations.content):
        yield Finding("problem", "automations", "a run that dies would be Running for ever", "proxyrob deploy")
    for pool in POOLS:
        workers = around.ask_prefect(f"work_pools/{pool}/workers/filter", {})
        online = [worker["name"] for worker in workers.content if worker["status"] == "ONLINE"] if workers.is_good else []
        waiting = around.ask_prefect(
            "flow_runs/count",
            {
                "work_pools": {"name": {"any_": [pool]}},
                "flow_runs": {"state": {"name": {"any_": ["Late", "AwaitingConcurrencySlot"]}}},
            },
        )
        late = waiting.content if waiting.is_good else 0
        if online:
            yield Finding("fine", f"pool {pool}", f"{', '.join(online)}; {late} runs wait")
        else:
            wanted = around.state is None or pool in pools_of(around.state) or late
            outcome: Outcome = "problem" if wanted else "note"
            yield Finding(
                outcome, f"pool {pool}", f"no worker is online; {late} runs wait", f"proxyrob serve worker --pool {pool}"
            )


def check_slots(around: Surroundings) -> Iterator[Finding]:
    """Concurrency slots of a deployment that are taken though none of its runs goes on: all later ones would wait for ever."""
    if around.prefect_api is None:
        return
    limits = around.ask_prefect("v2/concurrency_limits/filter", {})
    for limit in limits.content if limits.is_good else ():
        kind, _, deployment = limit["name"].partition(":")
        if kind != "deployment" or not limit["active_slots"]:
            continue
        running = around.ask_prefect(
            "flow_runs/count",
            {"deployments": {"id": {"any_": [deployment]}}, "flow_runs": {"state": {"type": {"any_": list(UNFINISHED)}}}},
        )
        if running.is_good and running.content < limit["active_slots"]:
            yield Finding(
                "problem",
                f"slots of {limit['name']}",
                f"{limit['active_slots']:g} taken, {running.content} runs go on",
                f"prefect global-concurrency-limit update {limit['name']} --active-slots {running.content}",
            )


def check_runs(around: Surroundings) -> Iterator[Finding]:
    """Runs that the server believes to go on, though they have given no sign of life: each holds its deployment's slot."""
    if around.prefect_api is None:
        return
    ours = {"flow_runs": {"tags": {"all_": [TAG]}, "state": {"type": {"any_": ["RUNNING"]}}}}
    runs = around.ask_prefect("flow_runs/filter", ours)
    since = datetime.now(UTC) - timedelta(seconds=SILENT_AFTER_S)
    for run in runs.content if runs.is_good else ():
        if datetime.fromisoformat(run["state"]["timestamp"]) > since:
            continue
        resource = f"prefect.flow-run.{run['id']}"
        heard = around.ask_prefect(
            "events/filter",
            {
                "filter": {
                    "event": {"name": ["prefect.flow-run.heartbeat"]},
                    "resource": {"id": [resource]},
                    "occurred": {"since": since.isoformat()},
                },
                "limit": 1,
            },
        )
        if heard.is_good and not heard.content["events"]:
            yield Finding(
                "problem",
                f"flow run {run['name']}",
                f"is Running, without a sign of life for {SILENT_AFTER_S} s",
                f"prefect flow-run delete {run['id']} frees its slot; what it finished is kept",
            )


def check_versions(around: Surroundings) -> Iterator[Finding]:
    """Whether the installed packages are those that this program asks for."""
    wrong = []
    try:
        wanted = [Requirement(text) for text in requires("proxyrob") or ()]
    except PackageNotFoundError:
        wanted = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} is {installed}, expected {requirement.specifier}")
    if wrong:
        yield Finding("problem", "packages", "; ".join(wrong), "install requirements.lock anew")
    else:
        yield Finding("fine", "packages", f"{len(wanted)} requirements fit")


def check_gpus(around: Surroundings) -> Iterator[Finding]:
    """Which GPUs stages compute on, and who has them."""
    from flows.running.gpus import Gpus, find_gpus  # not at the top, nor torch: whoever has none need not wait for them
    from proxyrob.device import resolve_device

    try:
        gpus = find_gpus(str(resolve_device(around.settings.device)))
    except ValueError as error:
        yield Finding("problem", "device", str(error), "correct PROXYROB_DEVICE or CUDA_VISIBLE_DEVICES")
        return
    if not gpus:
        yield Finding("fine", "device", "stages compute on the CPU")
    for gpu, holder in Gpus(around.settings.gpus, gpus).holders().items():
        yield Finding("fine", f"GPU {gpu.token}", "free" if holder is None else f"taken, {holder.describe()}")


def check_room(around: Surroundings) -> Iterator[Finding]:
    """Whether the disk has room for checkpoints and samples."""
    free = shutil.disk_usage(around.settings.store).free / 1e9
    finding = f"{free:.0f} GB free at {around.settings.home.absolute()}"
    if free < LEAST_ROOM_GB:
        yield Finding("problem", "disk", finding, f"free some space: below {LEAST_ROOM_GB:g} GB runs may end in the middle")
    else:
        yield Finding("fine", "disk", finding)


def check_data(around: Surroundings) -> Iterator[Finding]:
    """Whether an object can be written, read and deleted where synthetic images lie."""
    if around.settings.data is None:
        return
    key = f"doctor/{uuid.uuid4().hex}"
    try:
        store = open_store(around.settings.data)
        store.write(key, b"proxyrob doctor")
        store.read(key)
        store.delete(key)
    except (OSError, ValueError) as error:
        remedy = "check AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's name in PROXYROB_DATA"
        yield Finding("problem", around.settings.data, str(error), remedy)
    else:
        yield Finding("fine", around.settings.data, "written, read and deleted an object")


def check_cluster(around: Surroundings) -> Iterator[Finding]:
    """Whether the cluster that is to share stages answers, and whether the work would go on on each of its nodes."""
    settings = around.settings
    if settings.runner == "threads":
        return
    from flows.running.cluster import START_NODE, connect, inspect_nodes  # they import Prefect, which takes seconds

    subject = f"{settings.runner} cluster at {settings.cluster}"
    try:
        with connect(settings) as cluster:
            nodes = cluster.nodes()
            if around.prefect_api is None:
                remedy = "set PREFECT_API_URL to a server that all nodes reach; that of a run itself is for this machine alone"
                yield Finding("problem", subject, "its nodes need a Prefect server", remedy)
            problems = inspect_nodes(cluster, settings, around.prefect_api) if around.prefect_api else {}
            for name, problem in problems.items():
                yield Finding("problem", f"node {name}", problem)
            found = cluster.describe() if nodes else "has no node that takes work"
            yield Finding("fine" if nodes else "problem", subject, found, "" if nodes else START_NODE[settings.runner])
    except (OSError, ValueError) as error:
        yield Finding("problem", subject, str(error))


CHECKS: tuple[Callable[[Surroundings], Iterator[Finding]], ...] = (
    check_processes,
    check_ports,
    check_servers,
    check_deployments,
    check_slots,
    check_runs,
    check_versions,
    check_gpus,
    check_room,
    check_data,
    check_cluster,
)
