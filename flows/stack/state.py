"""The stack on one host: what it consists of, where it keeps its files, and how it is ended.

Everything lies below ``PROXYROB_HOME/stack``: ``state.json`` (which processes there are, written by the supervisor alone), a
log of each, Prefect's database. MLflow's server serves the store that ``proxyrob run`` uses without one.
"""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from flows.settings import Settings
from flows.stack.processes import MARK, Recorded, end_processes, find_marked, kill_processes
from flows.stack.services import POOLS, Command, describe_service, without_server_secrets
from proxyrob.storage.bounded import read_small
from proxyrob.storage.files import write_bytes

SERVERS = ("prefect", "mlflow")
DEPLOY = "deploy"
STATE, LOCK = "state.json", "supervisor.lock"
Condition = Literal["waiting", "starting", "ready", "done", "down"]

RUNS_END_S, WORKERS_END_S, SERVERS_END_S = 40.0, 10.0, 10.0
"""A flow run that is told to end writes a checkpoint first, for which a stage has 25 seconds."""


class Part(BaseModel):
    """One process of the stack as it is now; ``None`` before it was started, or while it waits to be started again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    condition: Condition = "waiting"
    process: Recorded | None = None
    since: float = 0.0
    restarts: int = 0
    ready_after_s: float | None = None
    fault: str | None = None


class State(BaseModel):
    """What ``state.json`` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mark: str
    supervisor: Recorded
    started_at: float
    prefect_port: int
    mlflow_port: int
    parts: tuple[Part, ...]

    @property
    def prefect_url(self) -> str:
        return f"http://127.0.0.1:{self.prefect_port}"

    @property
    def mlflow_url(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def exports(self) -> dict[str, str]:
        """What a shell has to export for its commands to use this stack."""
        return {"PREFECT_API_URL": f"{self.prefect_url}/api", "PROXYROB_TRACKING_URI": self.mlflow_url}

    @property
    def is_up(self) -> bool:
        return self.supervisor.find() is not None and all(part.condition in {"ready", "done"} for part in self.parts)


def read_state(settings: Settings) -> State | None:
    """What the supervisor wrote last; ``None`` where no stack was started, or it was ended.

    Raises ``ValueError`` when the file cannot be read, saying what to do.
    """
    path = settings.stack / STATE
    try:
        return State.model_validate_json(read_small(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ValueError(
            f"{path} was written by another version of this program; end its processes with that one's 'proxyrob down', "
            "then delete the file"
        ) from error


def write_state(settings: Settings, state: State) -> None:
    """Write the state whole."""
    write_bytes(settings.stack / STATE, state.model_dump_json(indent=2).encode())


def log_of(settings: Settings, name: str) -> Path:
    """The log of one process."""
    return settings.stack / "logs" / f"{name}.log"


def part_names(pools: tuple[str, ...]) -> tuple[str, ...]:
    """The processes of a stack, in the order in which they are started."""
    return (*SERVERS, DEPLOY, *(f"worker-{pool}" for pool in pools))


def needed_by(name: str) -> tuple[str, ...]:
    """What has to be ready before a process is started."""
    if name in SERVERS:
        return ()
    return ("prefect",) if name == DEPLOY else ("mlflow", DEPLOY)


def describe_part(name: str, settings: Settings, state: State, given: dict[str, str]) -> Command:
    """The command of one process of the stack, in the environment of the user who started it."""
    inherited = {key: value for key, value in given.items() if not key.startswith(("PREFECT_API_DATABASE", "PREFECT_PROFILE"))}
    environment = {
        **inherited,
        **state.exports,
        MARK: state.mark,
        "PROXYROB_HOME": str(settings.home.absolute()),
        "PREFECT_SERVER_API_PORT": str(state.prefect_port),
        "MLFLOW_PORT": str(state.mlflow_port),
    }
    if name not in SERVERS:
        environment = {**without_server_secrets(environment), "MLFLOW_TRACKING_URI": state.mlflow_url}
    if name == DEPLOY:
        command = describe_service("prefect", settings, environment)
        return Command((command.arguments[0], "-m", "flows.cli", "deploy"), command.environment)
    pool = name.removeprefix("worker-")
    if pool == name:
        return describe_service(name, settings, environment)
    return describe_service("worker", settings, environment, pool=pool)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def is_free(port: int) -> bool:
    """Whether a server may be started on a port of loopback."""
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False


def end_parts(state: State) -> int:
    """End all processes of a stack but its supervisor: runs and workers first, while the servers can still take down what
    becomes of them. The number of those that had to be killed at last.
    """
    found = {part.name: process for part in state.parts if part.process and (process := part.process.find())}
    workers = [process for name, process in found.items() if name not in SERVERS]
    runs = []
    for worker in workers:
        with suppress(psutil.Error):
            runs += worker.children()
    end_processes(runs, RUNS_END_S)  # before the workers, which would kill them at once, and with nobody told
    end_processes(workers, WORKERS_END_S)
    end_processes([process for name, process in found.items() if name in SERVERS], SERVERS_END_S)
    left = [process for process in find_marked(state.mark) if process.pid not in {os.getpid(), state.supervisor.pid}]
    kill_processes(left)
    return len(left)


def forget_state(settings: Settings) -> None:
    """The stack has ended."""
    (settings.stack / STATE).unlink(missing_ok=True)


def age_of(moment: float) -> str:
    """How long ago that was, for people."""
    seconds = max(0, int(time.time() - moment))
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h"


def pools_of(state: State) -> tuple[str, ...]:
    """The pools that have a worker here."""
    return tuple(pool for pool in POOLS if f"worker-{pool}" in {part.name for part in state.parts})
