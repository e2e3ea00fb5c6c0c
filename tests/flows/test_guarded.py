"""MLflow's server with passwords: who is let in, who may do what, and what nobody gets to read."""

import configparser
import os
import stat
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.settings import Settings
from flows.stack.answers import ask
from flows.stack.doctor import examine
from flows.stack.services import describe_service, without_server_secrets
from tests.composed import PROGRAM
from tests.mlflow_server import MlflowServer
from tests.s3_server import free_ports

ADMIN, SECRET = "keeper", "a-long-secret/with+signs"
READER, READERS_SECRET = "reader", "another-long-secret"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server that was given an administrator."""
    site = {"MLFLOW_AUTH_ADMIN_USERNAME": ADMIN, "MLFLOW_AUTH_ADMIN_PASSWORD": SECRET}
    started = MlflowServer(tmp_path_factory.mktemp("guarded"), **site)
    started.start()
    yield started
    started.kill()


@pytest.fixture
def sign_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the administrator; nobody afterwards."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    _become(monkeypatch, ADMIN, SECRET)


def _become(monkeypatch: pytest.MonkeyPatch, user: str, password: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)


def test_nobody_is_let_in_without_a_password(server: MlflowServer) -> None:
    """Anonymous requests and wrong passwords get 401, whatever they ask for; whether the server lives is no secret."""
    for path in (
        "api/2.0/mlflow/experiments/search?max_results=1",
        "api/2.0/mlflow/registered-models/search",
        "",
        "get-artifact",
    ):
        assert ask(f"{server.url}/{path}").status == 401, path
        assert ask(f"{server.url}/{path}", credentials=f"{ADMIN}:wrong").status == 401, path
    assert ask(f"{server.url}/health").is_good
    assert ask(f"{server.url}/api/2.0/mlflow/experiments/search?max_results=1", credentials=f"{ADMIN}:{SECRET}").is_good


def test_a_reader_may_pull_and_not_write(
    server: MlflowServer, sign_in: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An account without any further permission reads the champion and its files, and changes nothing."""
    keeper, account = MlflowClient(server.url, server.url), {"username": READER, "password": READERS_SECRET}
    experiment = keeper.create_experiment("kept")
    run_id = keeper.create_run(experiment).info.run_id
    keeper.log_text(run_id, "the card", "model/card.md")
    keeper.create_registered_model("digits-linf")
    version = keeper.create_model_version("digits-linf", f"runs:/{run_id}/model", run_id=run_id)
    keeper.set_registered_model_alias("digits-linf", "champion", version.version)
    made = ask(f"{server.url}/api/2.0/mlflow/users/create", account, credentials=f"{ADMIN}:{SECRET}")
    assert made.is_good, made.content
    _become(monkeypatch, READER, READERS_SECRET)
    reader = MlflowClient(server.url, server.url)
    assert reader.get_model_version_by_alias("digits-linf", "champion").version == version.version
    assert Path(reader.download_artifacts(run_id, "model/card.md", str(tmp_path))).read_text() == "the card"
    changes = {
        "alias": lambda: reader.set_registered_model_alias("digits-linf", "champion", version.version),
        "tag": lambda: reader.set_model_version_tag("digits-linf", version.version, "gate", "PASS"),
        "metric": lambda: reader.log_metric(run_id, "autoattack_accuracy", 1.0),
        "run": lambda: reader.create_run(experiment),
        "artifact": lambda: reader.log_text(run_id, "another card", "model/card.md"),
    }
    for name, change in changes.items():
        with pytest.raises((MlflowException, OSError)) as refused:
            change()
        assert "403" in str(refused.value) or getattr(refused.value, "error_code", "") == "PERMISSION_DENIED", name
        assert READERS_SECRET not in str(refused.value)


def test_a_wrong_password_is_said_without_it(server: MlflowServer, sign_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user sees names neither the password nor its encoding; doctor says which variables to set."""
    _become(monkeypatch, ADMIN, "not-the-secret")
    with pytest.raises(MlflowException) as refused:
        MlflowClient(server.url, server.url).search_experiments()
    assert "401" in str(refused.value)
    told = [f"{found.finding} {found.remedy}" for found in examine(Settings(home=server.home, tracking_uri=server.url))]
    assert any("MLFLOW_TRACKING_PASSWORD" in text and "refuses our credentials" in text for text in told)
    for text in (str(refused.value), *told):
        assert "not-the-secret" not in text
        assert b64encode(f"{ADMIN}:not-the-secret".encode()).decode() not in text


@pytest.mark.parametrize(
    ("signed_in", "said"),
    [
        (True, "MLflow refuses our credentials: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (False, "MLflow does not answer (Connection refused); start it, or correct PROXYROB_TRACKING_URI"),
    ],
)
def test_a_command_says_what_to_do(server: MlflowServer, tmp_path: Path, signed_in: bool, said: str) -> None:
    """A wrong password and an address where nobody listens are told apart at once; a password in an address is not shown."""
    (port,) = free_ports(1)
    wrong = {"MLFLOW_TRACKING_USERNAME": ADMIN, "MLFLOW_TRACKING_PASSWORD": "not-the-secret"}
    address = server.url if signed_in else f"http://{ADMIN}:not-the-secret@127.0.0.1:{port}"
    given = {"PATH": os.environ["PATH"], "PROXYROB_HOME": str(tmp_path), "PROXYROB_TRACKING_URI": address}
    done = subprocess.run(
        [PROGRAM, "history", "digits-linf"],
        env=given | (wrong if signed_in else {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert "not-the-secret" not in done.stdout + done.stderr


def test_no_file_holds_the_password(server: MlflowServer, sign_in: None) -> None:
    """It is in no file of the server, in no encoding: configuration (which its owner alone may read), users, runs, log."""
    MlflowClient(server.url, server.url).search_experiments()
    encoded = [SECRET, b64encode(f"{ADMIN}:{SECRET}".encode()).decode(), SECRET.replace("/", "%2F").replace("+", "%2B")]
    files = [path for path in server.home.rglob("*") if path.is_file()]
    assert {"mlflow-auth.ini", "mlflow-users.db", "mlflow-server.log"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert not any(text.encode() in content for text in encoded), path
    assert stat.S_IMODE((server.home / "stack" / "mlflow-auth.ini").stat().st_mode) == 0o600


def test_what_servers_know_is_kept_from_workers() -> None:
    """A worker signs in and knows no more; half a pair of name and password is refused before anything starts."""
    given = {"MLFLOW_AUTH_ADMIN_USERNAME": ADMIN, "MLFLOW_AUTH_ADMIN_PASSWORD": SECRET, "PREFECT_SERVER_API_AUTH_STRING": "a:b"}
    client = without_server_secrets(given)
    assert client == {
        "MLFLOW_TRACKING_USERNAME": ADMIN,
        "MLFLOW_TRACKING_PASSWORD": SECRET,
        "PREFECT_API_AUTH_STRING": "a:b",
    }
    assert without_server_secrets({**given, "MLFLOW_TRACKING_USERNAME": "me"})["MLFLOW_TRACKING_USERNAME"] == "me"
    with pytest.raises(ValueError, match="set both MLFLOW_AUTH_ADMIN_USERNAME and MLFLOW_AUTH_ADMIN_PASSWORD"):
        without_server_secrets({"MLFLOW_AUTH_ADMIN_USERNAME": ADMIN})


def test_users_lie_beside_the_runs_in_postgresql(tmp_path: Path) -> None:
    """Where runs lie in PostgreSQL users do, too, with every sign of its password; the variable of the file is set."""
    store = "postgresql+psycopg2://me:50%25@db/mlflow"
    site = {"MLFLOW_AUTH_ADMIN_USERNAME": ADMIN, "MLFLOW_AUTH_ADMIN_PASSWORD": SECRET, "MLFLOW_BACKEND_STORE_URI": store}
    settings = Settings(home=tmp_path)
    settings.stack.mkdir()
    command = describe_service("mlflow", settings, {"PATH": os.environ["PATH"], **site})
    config = configparser.ConfigParser()
    config.read(command.environment["MLFLOW_AUTH_CONFIG_PATH"])
    assert config["mlflow"]["database_uri"] == store
    assert int(config["mlflow"]["auth_cache_ttl_seconds"]) > 0, "else each request hashes the password anew"
    assert command.arguments[-2:] == ("--app-name", "basic-auth")
