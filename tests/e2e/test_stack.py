"""Production for real: the services of the compose file, and the stack on one host."""

import json
import os
import subprocess
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from flows.stack.answers import Answer, ask
from flows.stack.processes import find_marked
from tests.composed import Composed, Postgres
from tests.e2e.conftest import Program
from tests.s3_server import BUCKET, KEY, SECRET, S3Server, free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

START_S, RUN_S = 300.0, 600.0


def _until(true: Callable[[], bool], patience_s: float, what: str) -> None:
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, f"{what} not within {patience_s:g} s"
        time.sleep(1.0)


class Services:
    """Services of the compose file as processes of this machine."""

    def __init__(self, folder: Path, database: Path, s3: S3Server) -> None:
        self.folder, self.s3 = folder, s3
        ports = dict(zip(("postgres", "prefect", "mlflow"), free_ports(3), strict=True))
        self.postgres = Postgres(database / "postgres", ports["postgres"], "letters4digits")
        self.composed = Composed(
            {
                "POSTGRES_PASSWORD": self.postgres.password,
                "PREFECT_AUTH": "admin:open-sesame",
                "MLFLOW_ADMIN": "keeper",
                "MLFLOW_ADMIN_PASSWORD": "open/the+registry",
                "S3_KEY": KEY,
                "S3_SECRET": SECRET,
                "S3_BUCKET": BUCKET,
            },
            {
                "postgres:5432": f"127.0.0.1:{ports['postgres']}",
                "http://s3:8333": s3.url,
                "prefect:4200": f"127.0.0.1:{ports['prefect']}",
                "mlflow:5000": f"127.0.0.1:{ports['mlflow']}",
                "0.0.0.0": "127.0.0.1",  # noqa: S104  (what a container listens on)
            },
        )
        self.ports = {"PREFECT_SERVER_API_PORT": str(ports["prefect"]), "MLFLOW_PORT": str(ports["mlflow"])}
        self.running: list[subprocess.Popen[bytes]] = []

    def environment(self, name: str) -> dict[str, str]:
        given = self.composed.environment(name)
        moved = {key: value for key, value in self.ports.items() if key in given}
        return {"PATH": os.environ["PATH"], "HOME": str(self.folder), "PROXYROB_HOME": str(self.folder), **given, **moved}

    def start(self, name: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                self.composed.command(name), env=self.environment(name), stdout=log, stderr=log, cwd=self.folder
            )
        self.running.append(process)
        return process

    def ask(self, path: str, body: object = None) -> Answer:
        clients = self.environment("deploy")
        return ask(f"{clients['PREFECT_API_URL']}/{path}", body, credentials=clients["PREFECT_API_AUTH_STRING"])

    @property
    def mlflow_credentials(self) -> str:
        return f"{self.composed.variables['MLFLOW_ADMIN']}:{self.composed.variables['MLFLOW_ADMIN_PASSWORD']}"

    def secrets(self) -> dict[str, set[bytes]]:
        """Every secret of the stack, in each form in which it could be written down."""
        given = self.composed.variables
        plain = {
            "of PostgreSQL": given["POSTGRES_PASSWORD"],
            "of Prefect": given["PREFECT_AUTH"].partition(":")[2],
            "of MLflow": given["MLFLOW_ADMIN_PASSWORD"],
            "of S3": given["S3_SECRET"],
        }
        signed = {"of Prefect": given["PREFECT_AUTH"], "of MLflow": self.mlflow_credentials}
        forms = {
            name: {secret, quote(secret, safe=""), quote_plus(secret), b64encode(secret.encode()).decode()}
            for name, secret in plain.items()
        }
        for name, pair in signed.items():
            forms[name].add(b64encode(pair.encode()).decode())
        return {name: {form.encode() for form in found} for name, found in forms.items()}

    def written(self) -> Iterator[tuple[str, bytes]]:
        """All that the stack has written down, by its place: databases, logs, the home of worker and servers, S3."""
        for name in ("prefect", "mlflow"):
            yield f"database {name}", self.postgres.dump(name)
        yield "log of PostgreSQL", (self.postgres.folder / "log").read_bytes()
        for path in self.folder.rglob("*"):
            if path.is_file() and path.name != "mlflow-auth.ini":  # which has the address of the users' database, for its owner
                yield str(path), path.read_bytes()
        client = self.s3.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
            for item in page.get("Contents", ()):
                yield item["Key"], client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read()

    def stop(self) -> None:
        for process in reversed(self.running):  # the worker first, while it can still say good-bye to its server
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


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
        started.postgres.start()
        stack.callback(started.postgres.stop)
        stack.callback(started.stop)
        started.start("prefect")
        started.start("mlflow")
        mlflow = started.environment("deploy")["PROXYROB_TRACKING_URI"]
        _until(lambda: started.ask("health").is_good and ask(f"{mlflow}/health").is_good, START_S, "both servers")
        assert started.start("deploy").wait(START_S) == 0
        started.start("worker-cpu")
        _until(lambda: bool(started.ask("work_pools/cpu/workers/filter", {}).content), START_S, "a worker")
        yield started


def test_the_composed_services_run_the_pipeline(services: Services, make_program: Callable[[], Program]) -> None:
    """On PostgreSQL and S3, with passwords: deploying twice changes nothing, a run registers a model, files are on S3."""
    before = {name: services.ask(f"{name}/filter", {}).content for name in ("deployments", "automations")}
    assert services.start("deploy").wait(START_S) == 0
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
    _until(lambda: services.ask(f"flow_runs/{run['id']}").content["state_type"] in {"COMPLETED", "FAILED"}, RUN_S, "the run")
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
