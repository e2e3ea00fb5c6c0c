"""The servers and workers that production consists of: each one's command and settings, written once.

``proxyrob serve NAME`` becomes one of them, which is what ``deployments/compose.yaml`` runs in its containers; ``proxyrob up``
starts the same ones under its supervisor. Whatever a site decides (addresses, databases, stores) comes from the variables that
Prefect and MLflow read themselves.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from flows.settings import Settings, prepare_environment

ServiceName = Literal["prefect", "mlflow", "worker"]
POOLS = ("cpu", "gpu")
TAG = "proxyrob"
"""Every deployment of ours has it, and its runs inherit it."""
HEARTBEAT_S = 30
"""How often a flow run on a worker says that it lives: the shortest that Prefect allows."""


@dataclass(frozen=True)
class Command:
    """What to run, and in which environment."""

    arguments: tuple[str, ...]
    environment: dict[str, str]


def describe_service(
    name: str, settings: Settings, given: Mapping[str, str] = os.environ, *, pool: str | None = None, limit: int | None = None
) -> Command:
    """The command of a service and its environment: ``given``, completed where it leaves something open.

    Raises ``ValueError`` for a name that is none, a worker without pool or without the address of its server.
    """
    if name not in get_args(ServiceName):
        raise ValueError(f"expected a service out of {', '.join(get_args(ServiceName))}, got {name!r}")
    if (pool is None) == (name == "worker"):
        raise ValueError("a worker needs a pool (--pool cpu), and nothing else has one")
    environment = {**given, "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO", "PYTHONUNBUFFERED": "1"}
    prepare_environment(settings, environment)
    completing = {"prefect": _prefect_server, "mlflow": _mlflow_server, "worker": _worker}[name]
    if pool == "cpu":
        environment.setdefault("PROXYROB_DEVICE", "cpu")
    for key, value in completing(settings, environment).items():
        environment.setdefault(key, value)
    program = (sys.executable, "-m", "mlflow" if name == "mlflow" else "prefect")
    if pool is None:
        return Command((*program, "server", *(() if name == "mlflow" else ("start",))), environment)
    options = ("--type", "process", "--install-policy", "never", "--no-create-pool-if-not-found")
    limited = () if limit is None else ("--limit", str(limit))
    return Command(
        (*program, "worker", "start", "--pool", pool, "--name", f"{pool}-{os.uname().nodename}", *options, *limited),
        environment,
    )


def _prefect_server(settings: Settings, given: Mapping[str, str]) -> dict[str, str]:
    return {
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": "4200",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{settings.stack / 'prefect.db'}",
        "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "flows.stack.ordering",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(settings.stack / "prefect-ui"),
    }


def _mlflow_server(settings: Settings, given: Mapping[str, str]) -> dict[str, str]:
    """Jobs are off because we run none, and their workers would outlive the server."""
    port = given.get("MLFLOW_PORT", "5000")
    names = ("localhost", "127.0.0.1")
    return {
        "MLFLOW_HOST": "127.0.0.1",
        "MLFLOW_PORT": port,
        "MLFLOW_WORKERS": "1",
        "MLFLOW_BACKEND_STORE_URI": settings.embedded_tracking_uri,
        "MLFLOW_ARTIFACTS_DESTINATION": settings.artifacts.as_uri(),
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join([*names, *(f"{name}:{port}" for name in names)]),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def _worker(settings: Settings, given: Mapping[str, str]) -> dict[str, str]:
    if not given.get("PREFECT_API_URL"):
        raise ValueError("a worker needs its server: set PREFECT_API_URL, such as http://127.0.0.1:4200/api")
    return {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S)}
