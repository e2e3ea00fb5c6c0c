"""The commands and settings of the servers and workers."""

from pathlib import Path

import pytest

from flows.settings import Settings
from flows.stack.services import POOLS, describe_service
from flows.stack.state import State, describe_part, needed_by, part_names

API = {"PREFECT_API_URL": "http://127.0.0.1:4200/api"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A home of its own."""
    return Settings(home=tmp_path)


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_servers_listen_on_loopback_and_report_to_nobody(settings: Settings, name: str) -> None:
    """Without further settings a server is reached from this machine alone, and no usage reports are sent."""
    given = describe_service(name, settings, {}).environment
    assert {given.get("PREFECT_SERVER_API_HOST"), given.get("MLFLOW_HOST")} == {"127.0.0.1", None}
    expected = {"DO_NOT_TRACK": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    assert expected.items() <= given.items()


def test_mlflow_runs_no_jobs_and_knows_its_names(settings: Settings) -> None:
    """Its job workers would outlive it; it answers under the names of loopback with the port that it has."""
    given = describe_service("mlflow", settings, {"MLFLOW_PORT": "5055"}).environment
    assert given["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert given["MLFLOW_SERVER_ALLOWED_HOSTS"] == "localhost,127.0.0.1,localhost:5055,127.0.0.1:5055"
    assert given["MLFLOW_BACKEND_STORE_URI"] == settings.resolved_tracking_uri


def test_what_the_site_says_wins(settings: Settings) -> None:
    """A database or a host name in the environment is not replaced by our own."""
    chosen = {"MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg2://db/mlflow", "MLFLOW_HOST": "0.0.0.0"}  # noqa: S104  (a container)
    assert chosen.items() <= describe_service("mlflow", settings, chosen).environment.items()


def test_a_worker_is_told_its_pool_and_gives_signs_of_life(settings: Settings) -> None:
    """It takes work of one pool, never asks at the terminal, and its runs send heartbeats often enough."""
    command = describe_service("worker", settings, API, pool="cpu", limit=2)
    text = " ".join(command.arguments[1:])
    assert text.startswith("-m prefect worker start --pool cpu --name cpu-")
    assert text.endswith("--limit 2")
    assert "--install-policy never" in text
    assert command.environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert describe_service("worker", settings, API, pool="cpu").environment["PROXYROB_DEVICE"] == "cpu"
    assert "PROXYROB_DEVICE" not in describe_service("worker", settings, API, pool="gpu").environment


@pytest.mark.parametrize(
    ("name", "pool", "given", "message"),
    [
        ("postgres", None, {}, "expected a service out of prefect, mlflow, worker, got 'postgres'"),
        ("worker", None, API, "a worker needs a pool"),
        ("mlflow", "cpu", API, "nothing else has one"),
        ("worker", "cpu", {}, "set PREFECT_API_URL, such as http://127.0.0.1:4200/api"),
    ],
)
def test_wrong_use_is_refused(settings: Settings, name: str, pool: str | None, given: dict[str, str], message: str) -> None:
    """A service that is none, and a worker without pool or server, are refused with what to do."""
    with pytest.raises(ValueError, match=message):
        describe_service(name, settings, given, pool=pool)


def test_the_stack_tells_each_process_where_the_others_are(settings: Settings) -> None:
    """Workers use the stack's servers, whatever the shell has set; servers take the ports that were chosen."""
    state = State.model_validate(
        {
            "mark": "m",
            "supervisor": {"pid": 1, "created_at": 0.0},
            "started_at": 0.0,
            "prefect_port": 4321,
            "mlflow_port": 5432,
            "parts": [],
        }
    )
    shell = {"PREFECT_API_URL": "http://elsewhere/api", "MLFLOW_TRACKING_URI": "sqlite:///embedded.db"}
    worker = describe_part("worker-cpu", settings, state, shell).environment
    assert worker["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"
    assert worker["PROXYROB_TRACKING_URI"] == worker["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5432"
    assert describe_part("prefect", settings, state, shell).environment["PREFECT_SERVER_API_PORT"] == "4321"
    assert describe_part("deploy", settings, state, shell).arguments[1:] == ("-m", "flows.cli", "deploy")


def test_workers_start_last() -> None:
    """Every process is started after what it needs."""
    names = part_names(POOLS)
    assert names == ("prefect", "mlflow", "deploy", "worker-cpu", "worker-gpu")
    for place, name in enumerate(names):
        assert set(needed_by(name)) <= set(names[:place])
