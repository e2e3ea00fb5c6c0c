"""The compose file and the cluster's template say what the program does."""

import json
import re

import pytest
from prefect.server.schemas.actions import WorkPoolCreate

from flows.settings import PATIENT, Settings
from flows.stack.services import HEARTBEAT_S, describe_service
from tests.composed import EXAMPLE, FILE, ROOT, VARIABLE, Composed, read_services

OURS = {name: service for name, service in read_services().items() if service.get("image") == "proxyrob"}
SERVED = {name: service["command"] for name, service in OURS.items() if service.get("command", [""])[0] == "serve"}
VARIABLES = dict.fromkeys(re.findall(r"^(\w+)=", EXAMPLE.read_text(), re.MULTILINE), "x")


def test_no_secret_has_a_default() -> None:
    """Every variable is asked for with a message, none has a fallback, and the example has them all, empty."""
    text = FILE.read_text()
    assert set(re.findall(r"\$\{(\w+)", text)) == set(VARIABLES)
    assert all(found[2] for found in VARIABLE.findall(text) if found[1])
    assert {found[0] for found in VARIABLE.findall(text) if found[1]} == set(VARIABLES), "each is asked for once"
    assert len(VARIABLE.findall(text)) == text.count("${"), "no :-default"
    assert all(line.startswith("#") or line.endswith("=") for line in EXAMPLE.read_text().splitlines())


@pytest.mark.parametrize("name", SERVED)
def test_services_are_those_of_the_program(name: str) -> None:
    """Each ``serve`` is one that the program knows; what the file decides is kept, the rest comes from the program."""
    composed = Composed(VARIABLES, {})
    _, service, *options = composed.command(name)[1:]
    pool = options[1] if options else None
    given = composed.environment(name)
    command = describe_service(service, Settings(), given, pool=pool)
    assert given.items() <= command.environment.items()
    assert command.environment["DO_NOT_TRACK"] == "true"
    assert service != "mlflow" or command.environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_every_service_of_the_stack_is_there() -> None:
    """Servers, deployments and a worker of each pool: what ``proxyrob up`` starts on one host."""
    assert SERVED == {
        "prefect": ["serve", "prefect"],
        "mlflow": ["serve", "mlflow"],
        "worker-cpu": ["serve", "worker", "--pool", "cpu"],
        "worker-gpu": ["serve", "worker", "--pool", "gpu"],
    }
    assert OURS["deploy"]["command"] == ["deploy"]


def test_addresses_fit_together() -> None:
    """Clients call servers by names and ports that these have, MLflow lets that name in, and only loopback is published."""
    services = read_services()
    client = services["worker-cpu"]["environment"]
    assert client["PREFECT_API_URL"] == f"http://prefect:{services['prefect']['environment']['PREFECT_SERVER_API_PORT']}/api"
    called = client["PROXYROB_TRACKING_URI"].removeprefix("http://")
    assert called == f"mlflow:{services['mlflow']['environment']['MLFLOW_PORT']}"
    assert called in services["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert client["AWS_ENDPOINT_URL"] == services["mlflow"]["environment"]["MLFLOW_S3_ENDPOINT_URL"]
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", ()))


def test_health_checks_wait_for_a_slow_first_start() -> None:
    """A server that makes its tables first is given three minutes before it counts as sick."""
    for name in ("prefect", "mlflow"):
        assert int(read_services()[name]["healthcheck"]["start_period"].removesuffix("s")) >= 180


def test_the_template_of_the_cluster_fits_prefect() -> None:
    """Prefect's own schema accepts the base job template; each placeholder is a variable, each variable is used."""
    template = json.loads((ROOT / "deployments" / "kubernetes" / "gpu-pool.json").read_text())
    WorkPoolCreate.model_validate({"name": "gpu", "type": "kubernetes", "base_job_template": template})
    assert template["variables"]["properties"]["env"]["default"] == {
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        **PATIENT,
    }
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])
