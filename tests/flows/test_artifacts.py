"""Artifacts go straight to S3: no byte of them passes MLflow's server."""

import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from flows.settings import Settings, prepare_environment
from tests.mlflow_server import MlflowServer
from tests.s3_server import BUCKET, S3Server

LARGE_BYTES = 24_000_000
PASSED_BYTES = 200_000
"""What all requests about the artifacts may have together, far less than the large one."""


class Counter:
    """Passes connections on to a server, and counts the bytes of both directions."""

    def __init__(self) -> None:
        self.count, self.target = 0, 0
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        with self._listener:
            while not self._closing.is_set():
                if select.select([self._listener], [], [], 0.1)[0]:
                    thread = threading.Thread(target=self._pass_on, args=(self._listener.accept()[0],))
                    self._threads.append(thread)
                    thread.start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.target)) as server, suppress(OSError):
            while not self._closing.is_set():
                for one in select.select([client, server], [], [], 0.1)[0]:
                    if not (content := one.recv(65536)):
                        return
                    self.count += len(content)
                    (server if one is client else client).sendall(content)


@pytest.fixture(params=["signed", "direct"])
def counted(
    request: pytest.FixtureRequest, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Counter]:
    """A server whose artifacts lie on S3. ``signed``: it alone has credentials, and signs each request for its clients;
    ``direct``: it has none, and its clients have their own."""
    signed = request.param == "signed"
    credentials = s3_server.environment
    site = {"MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/signed", "MLFLOW_S3_ENDPOINT_URL": s3_server.url, **credentials}
    if not signed:
        site = {"MLFLOW_DEFAULT_ARTIFACT_ROOT": f"s3://{BUCKET}/direct", "MLFLOW_SERVE_ARTIFACTS": "false"}
    environment: dict[str, str] = {}
    prepare_environment(Settings(home=tmp_path / "client"), environment)
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    clients = {name: value for name, value in environment.items() if name.startswith("MLFLOW_")}
    for name, value in (clients | ({} if signed else credentials)).items():
        monkeypatch.setenv(name, value)
    with ExitStack() as stack:
        counter = Counter()
        stack.callback(counter.close)
        server = MlflowServer(tmp_path, **site, MLFLOW_SERVER_ALLOWED_HOSTS=f"127.0.0.1:{counter.port}")
        stack.callback(server.kill)
        server.start()
        counter.target = server.port
        url = f"http://127.0.0.1:{counter.port}"
        before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
        mlflow.set_tracking_uri(url)
        mlflow.set_registry_uri(url)
        yield counter
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])


def test_no_byte_passes_the_server(counted: Counter, tmp_path: Path, s3_server: S3Server) -> None:
    """Small files, files of several parts and models lie on S3 as they were, and come back; the server saw requests alone."""
    url = f"http://127.0.0.1:{counted.port}"
    client = MlflowClient(url, url)
    experiment = client.create_experiment("artifacts")
    run_id = client.create_run(experiment).info.run_id
    files = {"small.json": b"{}", "picture.png": os.urandom(60_000), "large.bin": os.urandom(LARGE_BYTES)}
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
        client.log_artifact(run_id, str(folder / name), "tables")
    model = client.create_logged_model(experiment, name="model", source_run_id=run_id)
    client.log_model_artifacts(model.model_id, str(folder))
    client.create_registered_model("digits-linf")
    client.create_model_version("digits-linf", f"models:/{model.model_id}", run_id=run_id, model_id=model.model_id)
    fetched = Path(client.download_artifacts(run_id, "tables", str(tmp_path)))
    pulled = Path(download_artifacts("models:/digits-linf/1", dst_path=str(tmp_path / "pulled")))
    for name, content in files.items():
        assert (fetched / name).read_bytes() == content
        assert (pulled / name).read_bytes() == content
    sizes = [item["Size"] for item in s3_server.client().list_objects_v2(Bucket=BUCKET)["Contents"]]
    assert sizes.count(LARGE_BYTES) >= 2, "of the run and of the model"
    assert counted.count < PASSED_BYTES, f"{counted.count} bytes passed the server"
