"""Stores to test: a folder, and a prefix of a bucket of a real S3 server that runs as long as the tests do."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxyrob.storage import s3
from proxyrob.storage.store import Store, open_store
from tests.s3_faults import FaultyProxy
from tests.s3_server import BUCKET, S3Server

OpenAt = Callable[..., Store]


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """The environment of a client of the server; whoever changes it calls ``s3._connection.cache_clear()``."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(s3, "ATTEMPTS", 3)  # fewer than a user has, so that a store that stays away is told sooner
    forget_client()
    yield monkeypatch
    forget_client()


def forget_client() -> None:
    """Close the connections of this process's client; the next request reads the environment anew."""
    if s3._connection.cache_info().currsize:
        s3._client().close()
    s3._connection.cache_clear()


@pytest.fixture
def s3_store(s3_environment: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """An empty prefix of the server's bucket."""
    return open_store(f"s3://{BUCKET}/{tmp_path.name}")


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "folder":
        return open_store(tmp_path / "store")
    return request.getfixturevalue("s3_store")


@pytest.fixture
def faulty(s3_server: S3Server, s3_environment: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy before the server; the client goes through it."""
    with FaultyProxy(s3_server.url) as proxy:
        s3_environment.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy
        forget_client()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
