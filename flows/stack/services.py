"""The servers and workers that production consists of: each one's command and settings, written once.

``proxyrob serve NAME`` becomes one of them, which is what ``deployments/compose.yaml`` runs in its containers; ``proxyrob up``
starts the same ones under its supervisor. Whatever a site decides (addresses, databases, stores) comes from the variables that
Prefect and MLflow read themselves.
"""

import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from flows.settings import Settings, prepare_environment
from proxyrob.storage.files import written_whole

ServiceName = Literal["prefect", "mlflow", "worker"]
POOLS = ("cpu", "gpu")
TAG = "proxyrob"
"""Every deployment of ours has it, and its runs inherit it."""
ADMINISTRATOR = ("MLFLOW_AUTH_ADMIN_USERNAME", "MLFLOW_AUTH_ADMIN_PASSWORD")
SERVER_SECRETS = ("PREFECT_SERVER_API_AUTH_STRING", "MLFLOW_FLASK_SERVER_SECRET_KEY")
AUTH_CACHE_S = 60
"""For so long a password that was right is not hashed again, which costs more than the rest of a small request. MLflow forgets
it at once when it is changed there: there is one process of the server."""
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
        options = ("start",) if name == "prefect" else ("--app-name", "basic-auth") if is_guarded(environment) else ()
        return Command((*program, "server", *options), environment)
    options = ("--type", "process", "--install-policy", "never", "--no-create-pool-if-not-found")
    limited = () if limit is None else ("--limit", str(limit))
    return Command(
        (*program, "worker", "start", "--pool", pool, "--name", f"{pool}-{os.uname().nodename}", *options, *limited),
        environment,
    )


def is_guarded(environment: Mapping[str, str]) -> bool:
    """Whether MLflow's server is to let in only whom it knows: where a site gives its administrator a name and a password.

    Raises ``ValueError`` where it gives one alone.
    """
    given = [bool(environment.get(variable)) for variable in ADMINISTRATOR]
    if any(given) != all(given):
        raise ValueError(f"set both {' and '.join(ADMINISTRATOR)}, or none for a server that asks for no password")
    return all(given)


def without_server_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a client of both servers: what only the servers may know is left out, and where a client is not
    told who it is, it is whom the servers know first.
    """
    kept = {key: value for key, value in environment.items() if key not in {*ADMINISTRATOR, *SERVER_SECRETS}}
    if is_guarded(environment):
        for variable, administrator in zip(
            ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"), ADMINISTRATOR, strict=True
        ):
            kept.setdefault(variable, environment[administrator])
    if secret := environment.get("PREFECT_SERVER_API_AUTH_STRING"):
        kept.setdefault("PREFECT_API_AUTH_STRING", secret)
    return kept


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
    store = given.get("MLFLOW_BACKEND_STORE_URI", settings.embedded_tracking_uri)
    guarded = {}
    if is_guarded(given):
        guarded = {
            "MLFLOW_AUTH_CONFIG_PATH": str(_write_auth(settings, store)),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),  # of sessions in a browser, which a restart may end
        }
    return {
        **guarded,
        "MLFLOW_HOST": "127.0.0.1",
        "MLFLOW_PORT": port,
        "MLFLOW_WORKERS": "1",
        "MLFLOW_BACKEND_STORE_URI": settings.embedded_tracking_uri,
        "MLFLOW_ARTIFACTS_DESTINATION": settings.artifacts.as_uri(),
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join([*names, *(f"{name}:{port}" for name in names)]),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def _write_auth(settings: Settings, store: str) -> Path:
    """Who may do what: users lie beside the runs where these are in PostgreSQL, else in a file of the stack.

    The administrator's password is not in it; a database's is, so nobody else may read it.
    """
    users = f"sqlite:///{settings.stack / 'mlflow-users.db'}" if store.startswith("sqlite") else store
    lines = (
        "[mlflow]",
        "default_permission = READ",
        f"database_uri = {users.replace('%', '%%')}",
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
        f"auth_cache_ttl_seconds = {AUTH_CACHE_S}",
    )
    path = settings.stack / "mlflow-auth.ini"
    with written_whole(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text("\n".join((*lines, "")))
    return path


def _worker(settings: Settings, given: Mapping[str, str]) -> dict[str, str]:
    if not given.get("PREFECT_API_URL"):
        raise ValueError("a worker needs its server: set PREFECT_API_URL, such as http://127.0.0.1:4200/api")
    return {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S)}
