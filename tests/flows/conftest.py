"""Workers for the flow tests."""

import pytest

from flows.running.workers import warm_up


@pytest.fixture(scope="session", autouse=True)
def warm_workers() -> None:
    """Let the fork server import torch once, as a run does."""
    warm_up(threads=1)
