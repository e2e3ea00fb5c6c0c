"""The curve of a training in MLflow: every point once, whatever dies, and never at the training's cost.

There is no file of what is still to be sent: the training's own record is one. Its points lie in every checkpoint and in the
tables of the finished stage, and whatever is not in MLflow then is logged from there. A point carries the moment of its record,
so that MLflow keeps one of several equal ones. What a killed training computes again has another moment, and is left out where
its step is there already.
"""

import threading
from collections.abc import Iterable

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from flows.records.patience import Tell, summarise

BATCH = 1000
"""Metrics in one request, as many as MLflow takes."""
INTERVAL_S, LONGEST_PAUSE_S = 5.0, 30.0
ROBUST_CURVE, SMOOTH_CURVE = "train", "train/smooth"
MOMENT = "time_s"


class LiveCurve:
    """Sends the figures of a training while it runs, from a thread of its own: a server that is away costs it nothing.

    Must be closed before the rest is logged by ``log_history``.
    """

    def __init__(self, client: MlflowClient, run_id: str, prefix: str, tell: Tell) -> None:
        self._client, self._run_id, self._prefix, self._tell = client, run_id, prefix, tell
        self._waiting: list[Metric] = []
        self._logged: dict[str, set[int]] = {}
        self._changed = threading.Condition()
        self._closing = self._away = False
        self._thread = threading.Thread(target=self._work, name=f"curve {prefix}", daemon=True)

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        """Take the figures after ``step`` steps, with the moment of their record (s since 1970); returns at once."""
        metrics = _points(self._prefix, step, figures)
        with self._changed:
            if self._closing:
                return
            self._waiting += metrics
            if self._thread.ident is None:
                self._thread.start()

    def close(self, patience_s: float | None = None) -> None:
        """Send what waits if the server takes it, give up if not; nothing is sent after this, unless a request outlasts
        ``patience_s``.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            started = self._thread.ident is not None
        if started:
            self._thread.join(patience_s)

    def _work(self) -> None:
        pause = INTERVAL_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing, pause)
                closing, batch = self._closing, self._waiting[:BATCH]
            sent = not batch or self._send(batch)
            with self._changed:
                if sent:
                    del self._waiting[: len(batch)]
                left = len(self._waiting)
            if closing and not (sent and left):
                return
            pause = (0.0 if left else INTERVAL_S) if sent else min(2 * max(pause, INTERVAL_S), LONGEST_PAUSE_S)

    def _send(self, batch: list[Metric]) -> bool:
        try:
            for key in {metric.key for metric in batch} - self._logged.keys():
                self._logged[key] = _logged_steps(self._client, self._run_id, key)
            new: dict[tuple[str, int], Metric] = {}
            for metric in batch:
                if metric.step not in self._logged[metric.key]:
                    new.setdefault((metric.key, metric.step), metric)
            if new:
                self._client.log_batch(self._run_id, metrics=list(new.values()))
                for key, step in new:
                    self._logged[key].add(step)
        except (MlflowException, OSError) as error:
            if not self._away:
                self._tell(f"MLflow does not take the curves of {self._prefix} ({summarise(error)}); they are sent later")
            self._away = True
            return False
        if self._away:
            self._tell(f"MLflow takes the curves of {self._prefix} again")
        self._away = False
        return True


def log_history(client: MlflowClient, run_id: str, prefix: str, history: pd.DataFrame) -> None:
    """Log those points of a finished training that are not there yet."""
    names = [name for name in history.columns if name not in ("step", MOMENT)]
    logged = {f"{prefix}/{name}": _logged_steps(client, run_id, f"{prefix}/{name}") for name in names}
    points = [
        point
        for row in history.to_dict("records")
        for point in _points(prefix, int(row["step"]), {name: float(row[name]) for name in (*names, MOMENT)})
        if point.step not in logged[point.key]
    ]
    log_metrics(client, run_id, points)


def log_metrics(client: MlflowClient, run_id: str, metrics: list[Metric]) -> None:
    """Log metrics in as few requests as there can be."""
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])


def close_all(curves: Iterable[LiveCurve], patience_s: float | None = None) -> None:
    """Close every curve."""
    for curve in curves:
        curve.close(patience_s)


def _points(prefix: str, step: int, figures: dict[str, float]) -> list[Metric]:
    moment = int(figures[MOMENT] * 1000)
    return [Metric(f"{prefix}/{name}", value, moment, step) for name, value in figures.items() if name != MOMENT]


def _logged_steps(client: MlflowClient, run_id: str, key: str) -> set[int]:
    return {point.step for point in client.get_metric_history(run_id, key)}
