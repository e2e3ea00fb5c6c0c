"""MLflow's pages in a browser, as a person sees them."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.records.tracking import Tracker
from flows.records.views import MODELS, PIPELINES, view_link
from flows.settings import Settings
from tests.e2e.conftest import Finished
from tests.mlflow_server import MlflowServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed"),
]
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-gpu")


@pytest.fixture(scope="module")
def server(finished: Finished) -> Iterator[MlflowServer]:
    """A server of the store that a run has written."""
    started = MlflowServer(finished.program.home)
    started.start()
    yield started
    started.kill()


def read_page(address: str, profile: Path) -> str:
    """The page after its scripts have run."""
    command = ["chromium", "--headless", "--no-sandbox", *QUIET, f"--user-data-dir={profile}", "--window-size=4000,3000"]
    shown = subprocess.run(
        [*command, "--virtual-time-budget=30000", "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    return shown.stdout


@pytest.mark.parametrize(
    ("key", "charts", "there", "not_there"),
    [
        (
            PIPELINES,
            False,
            ("autoattack_accuracy", "train.gamma", "proxyrob.gate", "tiny as it ships"),
            ("mixed · as it ships",),
        ),
        (PIPELINES, True, ("Results", "Pictures", "Mixed against real-only"), ()),
        (
            MODELS,
            False,
            ("proxyrob.sanity", "mixed · as it ships", "real-only · as it ships"),
            ("tiny as it ships", "proxy · as"),
        ),
    ],
)
def test_a_view_shows_what_matters(
    server: MlflowServer,
    finished: Finished,
    tmp_path: Path,
    key: str,
    charts: bool,
    there: tuple[str, ...],
    not_there: tuple[str, ...],
) -> None:
    """The links of an experiment open its views: columns, charts and pictures are there, children folded or alone."""
    experiment = Tracker(Settings(home=finished.program.home)).client.get_experiment_by_name("tiny")
    assert experiment is not None
    page = read_page(f"{server.url}/{view_link(experiment.experiment_id, key, charts=charts)}", tmp_path / "profile")
    assert "viewing a shared view" in page
    for text in there:
        assert text in page, text
    for text in not_there:
        assert text not in page, text
