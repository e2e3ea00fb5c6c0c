"""An MLflow server that goes away in the middle of a training, and comes back."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.records import curves, patience
from flows.records.curves import MOMENT, LiveCurve, log_history
from flows.records.patience import Patience, is_outage, patient_client
from flows.records.tracking import Tracker
from flows.running.workers import run_in_child
from flows.settings import Settings
from proxyrob.config import CnnModel, DigitsSource, NaturalObjective, RobustTrainConfig
from proxyrob.source import prepare_digits
from proxyrob.train import read_history, train_classifier
from tests.mlflow_server import MlflowServer
from tests.s3_server import free_ports
from tests.toys import stage_in

STEPS, AWAY_FROM, AWAY_UNTIL = 600, 150, 450
TRAINING = RobustTrainConfig(
    objective=NaturalObjective(), synthetic_fraction=0.0, gamma=1.0, steps=STEPS, batch_size=16, checkpoint_every=100
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server that has made its tables."""
    started = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    started.start()
    yield started
    started.kill()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Often enough that a short training sends many times."""
    monkeypatch.setattr(curves, "INTERVAL_S", 0.1)
    monkeypatch.setattr(curves, "LONGEST_PAUSE_S", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


def logged(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    """The points of a metric as the server has them."""
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))


def recorded(history: pd.DataFrame, name: str) -> list[tuple[int, float]]:
    """The points of the training's own record."""
    return sorted(zip(history.step.tolist(), history[name].tolist(), strict=True))


@pytest.mark.parametrize("away_s", [0.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_a_server_that_dies_costs_no_step_and_no_point(server: MlflowServer, tmp_path: Path, away_s: float) -> None:
    """Killed in the middle of a training and started again later, or only after it: the training goes on meanwhile, and in the
    end MLflow has every point of its record once, whoever logs them again."""
    source, stage, told = stage_in(tmp_path, "source"), stage_in(tmp_path, "train"), []
    prepare_digits(DigitsSource(num_train=60, num_validation=30, num_test=40), seed=0, stage=source)
    once = MlflowClient(server.url, server.url)
    run_id = once.create_run(once.create_experiment(f"outage {away_s}")).info.run_id
    curve, steps, back = LiveCurve(once, run_id, "train", told.append), [], None

    def watch(done: int, total: int, **figures: float) -> None:
        nonlocal back
        curve(done, figures)
        steps.append(done)
        if done == AWAY_FROM:
            deadline = time.monotonic() + 60
            while not logged(once, run_id, "train/loss"):  # so that some points are there before
                assert time.monotonic() < deadline, "nothing was sent while the server was there"
                time.sleep(0.05)
            server.kill()
            back = threading.Timer(away_s, server.start, kwargs={"wait": False}) if away_s else None
            if back is not None:
                back.start()
        if done == AWAY_UNTIL and back is None:
            server.start(wait=False)

    arguments = {"source": source, "synthetic": (), "threat": None, "seed": 0, "stage": stage}
    run_in_child(train_classifier, threads=1, on_progress=watch, model=CnnModel(widths=(4,)), config=TRAINING, **arguments)
    assert steps == list(range(10, STEPS + 1, 10)), "the training went on while nobody answered"
    curve.close()
    client = patient_client(once, Patience(server.url, told.append))
    history = read_history(stage)
    log_history(client, run_id, "train", history)
    for name in ("loss", "accuracy", "learning_rate"):
        assert logged(client, run_id, f"train/{name}") == recorded(history, name)
    assert any("does not take the curves" in text for text in told)

    log_history(client, run_id, "train", history)
    again = LiveCurve(once, run_id, "train", told.append)  # as of a training that was killed and computes its last steps again
    for row in history.tail(5).to_dict("records"):
        again(int(row["step"]), {"loss": float(row["loss"]), MOMENT: float(row[MOMENT]) + 100.0})
    again.close()
    assert logged(client, run_id, "train/loss") == recorded(history, "loss")


def test_the_same_points_twice_are_one(server: MlflowServer) -> None:
    """A request that was done though its answer was lost may be sent again: MLflow keeps one of equal points."""
    client = MlflowClient(server.url, server.url)
    run_id = client.create_run(client.create_experiment("twice")).info.run_id
    history = pd.DataFrame({"step": [1, 2], "loss": [0.5, 0.25], MOMENT: [100.0, 101.0]})
    points = [
        point
        for step, loss, at in history.itertuples(index=False)
        for point in curves._points("train", step, {"loss": loss, MOMENT: at})
    ]
    for _ in range(2):
        curves.log_metrics(client, run_id, points)
    assert logged(client, run_id, "train/loss") == [(1, 0.5), (2, 0.25)]


def test_whatever_is_asked_meanwhile_waits_and_says_so(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call to a server that is away is made again until it answers; the user is told once, with the reason."""
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.5)
    told: list[str] = []
    tracker = Tracker(Settings(home=server.home, tracking_uri=server.url), told.append)
    server.kill()
    threading.Timer(2.0, server.start, kwargs={"wait": False}).start()
    experiment = tracker.experiment("made after it came back")
    assert [found.name for found in tracker.client.search_experiments() if found.experiment_id == experiment] == [
        "made after it came back"
    ]
    counted = Counter("does not answer" in text for text in told)
    assert counted[True] == 1, told
    assert "does not answer (Connection refused)" in told[0]
    assert told[-1].startswith("MLflow answers again, after ")


def test_only_an_outage_is_waited_for(server: MlflowServer) -> None:
    """Nobody listening is an outage; an answer that says no is none, and comes at once."""
    (port,) = free_ports(1)
    with pytest.raises(MlflowException) as away:
        MlflowClient(f"http://127.0.0.1:{port}").search_experiments()
    assert is_outage(away.value)
    client = patient_client(MlflowClient(server.url), Patience(server.url, pytest.fail))
    with pytest.raises(MlflowException) as missing:
        client.get_run("0" * 32)
    assert not is_outage(missing.value)


def test_a_failed_run_is_not_kept_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server is away, that a run failed cannot be recorded: that is said, and its own cause is what is raised."""
    (port,) = free_ports(1)
    monkeypatch.setattr("flows.records.tracking.LEAST_PATIENCE_S", 0.5)
    told: list[str] = []
    Tracker(Settings(home=tmp_path, tracking_uri=f"http://127.0.0.1:{port}"), told.append).fail("0" * 32, "no images")
    assert "not recorded in MLflow" in told[-1]


def test_a_stage_whose_process_dies_doubles_no_point(server: MlflowServer) -> None:
    """It is tried again by the same run, whose curve has sent what is computed again, or still holds it."""
    once = MlflowClient(server.url, server.url)
    run_id = once.create_run(once.create_experiment("tried again")).info.run_id
    curve = LiveCurve(once, run_id, "train", print)
    for moment, steps in ((1.0, range(10, 60, 10)), (2.0, range(40, 80, 10)), (3.0, range(70, 110, 10))):
        for step in steps:
            curve(step, {MOMENT: moment + step, "loss": step / 100})
        if moment == 1.0:
            deadline = time.monotonic() + 20.0
            while len(logged(once, run_id, "train/loss")) < 5:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    curve.close()
    assert logged(once, run_id, "train/loss") == [(step, step / 100) for step in range(10, 110, 10)]
