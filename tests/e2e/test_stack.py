"""Production for real: the services of the compose file, and the stack on one host."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from flows.stack.answers import ask
from flows.stack.processes import find_marked
from tests.composed import Services, wait_until
from tests.e2e.conftest import Program
from tests.s3_server import BUCKET, S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

RUN_S = 600.0


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[Services]:
    """PostgreSQL, S3, Prefect, MLflow, the deployments and a worker."""
    with ExitStack() as stack:
        # PostgreSQL does not run as root, and pytest's folders are closed to anyone else.
        database = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="proxyrob-postgres-")))
        database.chmod(0o755)
        started = Services(tmp_path_factory.mktemp("services"), database, s3_server)
        if not started.postgres.programs.is_dir():
            pytest.skip("PostgreSQL is not installed")
        stack.callback(started.stop)
        started.start_all()
        yield started


def test_the_composed_services_run_the_pipeline(services: Services, make_program: Callable[[], Program]) -> None:
    """On PostgreSQL and S3, with passwords: deploying twice changes nothing, a run registers a model, files are on S3."""
    before = {name: services.ask(f"{name}/filter", {}).content for name in ("deployments", "automations")}
    services.deploy()
    after = {name: services.ask(f"{name}/filter", {}).content for name in ("deployments", "automations")}
    assert {d["id"] for d in after["deployments"]} == {d["id"] for d in before["deployments"]}
    assert after["automations"] == before["automations"]
    clients = services.environment("deploy")
    assert ask(f"{clients['PREFECT_API_URL']}/deployments/filter", {}).status == 401, "nobody is let in without a password"
    deployment = services.ask("deployments/name/proxyrob/digits").content["id"]
    refused = services.ask(f"deployments/{deployment}/create_flow_run", {"parameters": {"preset": ""}})
    assert refused.status in {409, 422}, "what does not fit the form makes no run"
    run = services.ask(
        f"deployments/{deployment}/create_flow_run", {"parameters": {"preset": str(make_program().preset)}}
    ).content
    wait_until(
        lambda: services.ask(f"flow_runs/{run['id']}").content["state_type"] in {"COMPLETED", "FAILED"}, RUN_S, "the run"
    )
    found = services.ask(f"flow_runs/{run['id']}").content
    log = (services.folder / "worker-cpu.log").read_text()
    assert found["state_type"] == "COMPLETED", log[-4000:]
    registry = f"{clients['PROXYROB_TRACKING_URI']}/api/2.0/mlflow/registered-models/search"
    assert ask(registry).status == 401, "nor here"
    versions = ask(registry, credentials=services.mlflow_credentials).content
    assert [model["name"] for model in versions["registered_models"]] == ["digits-linf"]
    keys = {item["Key"] for item in services.s3.client().list_objects_v2(Bucket=BUCKET)["Contents"]}
    assert any(key.startswith("mlflow/") and key.endswith("model.onnx") for key in keys)
    assert any(key.startswith("data/samples/") for key in keys)

    searched = 0
    for place, content in services.written():
        searched += 1
        for name, forms in services.secrets().items():
            assert not any(form in content for form in forms), f"the secret {name} is in {place}"
    assert searched > 100, "databases, logs, files of the home, objects"
    assert b"digits-linf" in services.postgres.dump("mlflow"), "what was searched is what was written"


def test_one_host_comes_up_and_goes_down(make_program: Callable[[], Program]) -> None:
    """``up`` is ready within its patience, says how to use it; ``down`` leaves no process."""
    program = make_program()
    started = program("up", "--prefect-port", "0", "--mlflow-port", "0", "--pool", "cpu")
    assert started.returncode == 0, started.stdout + started.stderr
    assert "export PREFECT_API_URL=http://127.0.0.1:" in started.stdout
    state = json.loads((program.home / "stack" / "state.json").read_text())
    try:
        assert program("status").returncode == 0
        assert program("doctor").returncode == 0
        again = program("up")
        assert (again.returncode, "a stack is running already" in again.stdout) == (0, True)
    finally:
        ended = program("down")
    assert ended.returncode == 0
    assert find_marked(state["mark"]) == []
    assert program("status").returncode == 1
