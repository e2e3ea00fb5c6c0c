"""Workers and a Prefect server for the flow tests."""

from collections.abc import Iterator

import pytest
from prefect.testing.utilities import prefect_test_harness

from flows.running.workers import warm_up


@pytest.fixture(scope="session", autouse=True)
def warm_workers() -> None:
    """Let the fork server import torch once, as a run does."""
    warm_up(threads=1)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect API with a database of its own."""
    with prefect_test_harness(server_startup_timeout=120):
        yield
