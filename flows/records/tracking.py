"""The one module that writes runs to MLflow. Every call may be repeated: a resumed pipeline goes on in the same runs."""

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run
from mlflow.exceptions import MlflowException

from flows.plan import Plan, ProxyStages, Variant
from flows.records.metrics import name_figures, variant_metrics
from flows.records.versions import git_commit, library_versions
from flows.settings import Settings
from proxyrob.certify.smoothing import CERTIFICATES
from proxyrob.config import flatten
from proxyrob.evaluate import SanityReport
from proxyrob.evaluate.verdicts import VERDICTS
from proxyrob.export import Measurement, render_measurement
from proxyrob.figures import PicturesReport
from proxyrob.intervals import measure_share
from proxyrob.label import LabelReport
from proxyrob.proxy import ProxyReport, SamplesReport
from proxyrob.shards import read_manifest
from proxyrob.source import SourceReport
from proxyrob.storage import Report, Stage
from proxyrob.train import TrainReport, read_curve, read_history

R = TypeVar("R", bound=Report)

BATCH = 1000
LIVE_INTERVAL_S = 5.0
CURVE_PREFIX, SMOOTH_CURVE_PREFIX = "train", "train/smooth"
FINISHED, FAILED, RUNNING = "FINISHED", "FAILED", "RUNNING"
DIGEST_TAG = "proxyrob.digest"
MEASUREMENTS = "measurements"
"""The experiment of what was measured outside a pipeline."""


class Tracker:
    """MLflow runs of pipelines: one parent for each pipeline, one child for the proxy and for each model."""

    def __init__(self, settings: Settings) -> None:
        self.uri = settings.resolved_tracking_uri
        self._artifacts = settings.artifacts if settings.tracking_uri is None else None
        self.client = MlflowClient(self.uri, self.uri)
        if self._artifacts is not None:
            self._artifacts.mkdir(parents=True, exist_ok=True)
            with FileLock(self._artifacts.parent / ".first-use.lock"):  # two first users at once would both make the tables
                self.client.search_experiments(max_results=1)

    def experiment(self, name: str) -> str:
        """The experiment of a preset, made on first use."""
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        location = None if self._artifacts is None else (self._artifacts / name).as_uri()
        note = f"Runs of the preset **{name}**. Each pipeline is a parent run; unfold it for `real-only`, `mixed` and `proxy`."
        return self.client.create_experiment(
            name,
            artifact_location=location,
            tags={"mlflow.note.content": note, "mlflow.experimentKind": "custom_model_development"},
        )

    def open_pipeline(self, plan: Plan, title: str, device: str) -> str:
        """The parent run of a plan: the one that is there already, or a new one."""
        tags = {
            "proxyrob.kind": "pipeline",
            "proxyrob.device": device,
            **({"mlflow.source.git.commit": commit} if (commit := git_commit()) else {}),
            **{f"proxyrob.version.{name}": number for name, number in library_versions().items()},
        }
        run = self._open(plan, title, plan.digest, tags)
        self._params(run, flatten(plan.config))
        return run.info.run_id

    def is_finished(self, run_id: str) -> bool:
        """Whether everything of a run was recorded already."""
        return self.client.get_run(run_id).info.status == FINISHED

    def record_proxy(self, plan: Plan, parent: str) -> None:
        """The child run of the proxy: what was fitted, sampled, labelled and dropped."""
        for proxy in plan.proxies:
            name = "proxy" if len(plan.proxies) == 1 else f"proxy {proxy.name}"
            run = self._open(plan, name, proxy.samples.digest, {"proxyrob.kind": "proxy"}, parent)
            if run.info.status != FINISHED:
                self._record_proxy(plan, proxy, run)

    def _record_proxy(self, plan: Plan, proxy: ProxyStages, run: Run) -> None:
        run_id = run.info.run_id
        samples, labels = _report(proxy.samples, SamplesReport), _report(proxy.labels, LabelReport)
        figures = {
            "synthetic_images": samples.num_images,
            "labelers_disagree": labels.num_disagree / labels.num_images,
            "kept": labels.num_kept / labels.num_images,
            "near_test_images": labels.num_leaked,
            "constant_images": samples.constant_images,
            "suspicious_shards": len(labels.suspicious_shards),
        }
        if proxy.fit is not None and (loss := _report(proxy.fit, ProxyReport).final_loss) is not None:
            figures["proxy_loss"] = loss
        self._params(
            run,
            {key: value for key, value in flatten(plan.config).items() if key.startswith(("proxy.", "sampling.", "label."))},
        )
        self._metrics(run_id, figures, proxy.labels)
        self._inputs(run_id, [_dataset(plan.source, "training")])
        self.client.log_text(run_id, read_manifest(proxy.images_at).content().decode(), "tables/manifest.json")
        self.client.set_tag(run_id, "proxyrob.images", proxy.images_at.uri)
        self.client.set_terminated(run_id, FINISHED)

    def open_variant(self, plan: Plan, variant: Variant, parent: str) -> str:
        """The child run of a model, made before it is trained so that its curves can be watched. Returns its id."""
        return self._open(plan, variant, plan.variants[variant].evaluate.digest, {"proxyrob.kind": "model"}, parent).info.run_id

    def live_curve(self, run_id: str, prefix: str) -> "LiveCurve":
        """Takes the figures of a training while it runs."""
        return LiveCurve(self.client, run_id, prefix)

    def record_variant(self, plan: Plan, variant: Variant, parent: str) -> str:
        """The child run of a model: curves, accuracies with intervals, certificates, tables. Returns its id."""
        stages = plan.variants[variant]
        run = self._open(plan, variant, stages.evaluate.digest, {"proxyrob.kind": "model"}, parent)
        run_id = run.info.run_id
        if run.info.status == FINISHED:
            return run_id
        self._params(
            run,
            {
                key: value
                for key, value in flatten(plan.config).items()
                if not key.startswith(("proxy.", "sampling.", "label."))
            },
        )
        for prefix, stage in ((CURVE_PREFIX, stages.train), (SMOOTH_CURVE_PREFIX, stages.smooth)):
            self._history(run_id, prefix, read_history(stage))
            self._history(run_id, prefix, read_curve(stage))
        trained = _report(stages.train, TrainReport)
        validated = {
            "validation_accuracy": trained.validation_correct,
            "validation_pgd_accuracy": trained.validation_pgd_correct,
        }
        shares = {name: measure_share(n, trained.num_validation) for name, n in validated.items() if n is not None}
        self._metrics(run_id, name_figures(shares), stages.train)
        self._metrics(run_id, variant_metrics(plan, variant), stages.certify)
        sanity = _report(stages.sanity, SanityReport)
        self.client.set_tag(run_id, "proxyrob.sanity", "passed" if sanity.passed else "failed")
        inputs = [_dataset(plan.source, "training"), _dataset(plan.source, "evaluation")]
        if variant == "mixed":
            inputs += [_dataset(proxy.samples, "training", proxy.images_at.uri) for proxy in plan.proxies]
        self._inputs(run_id, inputs)
        self._tables(
            run_id, {VERDICTS: stages.evaluate.verified(VERDICTS), CERTIFICATES: stages.certify.verified(CERTIFICATES)}
        )
        self.client.log_dict(run_id, sanity.model_dump(mode="json"), "sanity.json")
        return run_id

    def close_model(self, run_id: str) -> None:
        """Mark the run of a model as finished, after the model was registered where it is released."""
        self.client.set_terminated(run_id, FINISHED)

    def close_pipeline(self, plan: Plan, run_id: str, report: dict[str, Any], note: str) -> None:
        """Log the figures of the released model, the comparison, the pictures and the report, and finish the run."""
        figures = variant_metrics(plan, plan.released)
        for name, comparison in report["comparison"].items():
            for key in [] if "reason" in comparison else ("difference", "low", "high", "p_value"):
                figures[f"difference/{name}_{key}" if key != "difference" else f"difference/{name}"] = comparison[key]
        self._metrics(run_id, figures, plan.pictures)
        for name in _report(plan.pictures, PicturesReport).names:
            self.client.log_artifact(run_id, str(plan.pictures.verified(name)), "figures")
        self.client.log_dict(run_id, report, "report.json")
        self.client.log_text(run_id, yaml.safe_dump(plan.config.dump(), sort_keys=False), "configuration.yaml")
        self.client.set_tag(run_id, "mlflow.note.content", note)
        self.client.set_tag(run_id, "proxyrob.promotion", report["promotion"]["verdict"])
        self._inputs(run_id, [_dataset(plan.source, "training")])
        self.client.set_terminated(run_id, FINISHED)

    def record_measurement(
        self, stage: Stage, measurement: Measurement, figures: dict[str, float], params: dict[str, Any], files: Iterable[Path]
    ) -> str:
        """A run of its own for one measurement of a model, whoever trained it: figures, tables, pictures and card.

        A repeated call finds the run. Returns its id.
        """
        experiment = self.experiment(MEASUREMENTS)
        known = f"tags.`{DIGEST_TAG}` = '{stage.digest}'"
        if found := self.client.search_runs([experiment], known, max_results=1):
            return found[0].info.run_id
        tags = {
            "proxyrob.kind": "measurement",
            DIGEST_TAG: stage.digest,
            "mlflow.note.content": render_measurement(measurement),
            **{f"proxyrob.digest.{name}": digest for name, digest in measurement.digests.items()},
            **({"mlflow.source.git.commit": commit} if (commit := git_commit()) else {}),
        }
        if measurement.sanity is not None:
            tags["proxyrob.sanity"] = "passed" if measurement.sanity.passed else "failed"
        run = self.client.create_run(experiment, run_name=measurement.model, tags=tags)
        self._params(run, params)
        self._metrics(run.info.run_id, figures, stage)
        folders = {".parquet": "tables", ".png": "figures"}
        for path in files:
            self.client.log_artifact(run.info.run_id, str(path), folders.get(path.suffix))
        self.client.set_terminated(run.info.run_id, FINISHED)
        return run.info.run_id

    def fail(self, run_id: str, reason: str) -> None:
        """Mark a pipeline as failed, with the reason on its page; a later run with the same configuration reopens it."""
        self.client.set_tag(run_id, "mlflow.note.content", f"**Failed:** {reason}")
        experiment = self.client.get_run(run_id).info.experiment_id
        for child in self.client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'"):
            if child.info.status == RUNNING:
                self.client.set_terminated(child.info.run_id, FAILED)
        self.client.set_terminated(run_id, FAILED)

    def download(self, run_id: str, path: str, folder: Path) -> Path:
        """Fetch one artifact of a run."""
        return Path(self.client.download_artifacts(run_id, path, str(folder)))

    def _open(self, plan: Plan, name: str, digest: str, tags: dict[str, str], parent: str | None = None) -> Run:
        experiment = self.experiment(plan.config.name)
        belongs = f" and tags.`mlflow.parentRunId` = '{parent}'" if parent else " and tags.`proxyrob.kind` = 'pipeline'"
        found = self.client.search_runs([experiment], f"tags.`{DIGEST_TAG}` = '{digest}'{belongs}", max_results=1)
        if found:
            if found[0].info.status not in (FINISHED, RUNNING):
                self.client.update_run(found[0].info.run_id, status=RUNNING)
            return found[0]
        tags = {
            **tags,
            DIGEST_TAG: digest,
            "mlflow.source.name": f"proxyrob run {plan.config.name}",
            "mlflow.source.type": "LOCAL",
        }
        if parent:
            tags["mlflow.parentRunId"] = parent
        return self.client.create_run(experiment, run_name=name, tags=tags)

    def _params(self, run: Run, values: dict[str, Any]) -> None:
        params = [Param(key, json.dumps(value) if isinstance(value, list) else str(value)) for key, value in values.items()]
        missing = [param for param in params if param.key not in run.data.params]
        for start in range(0, len(missing), 100):
            self.client.log_batch(run.info.run_id, params=missing[start : start + 100])

    def _metrics(self, run_id: str, figures: dict[str, float], stage: Stage) -> None:
        """Stamped with the time the stage ended, so that logging them again adds nothing."""
        record = stage.record()
        assert record is not None
        moment = int(record.finished_at * 1000)
        self._log(run_id, [Metric(name, value, moment, 0) for name, value in figures.items()])

    def _history(self, run_id: str, prefix: str, history: pd.DataFrame) -> None:
        """Log the points of a curve that were not logged while it ran."""
        columns = [name for name in history.columns if name not in ("step", "time_s")]
        logged = {
            name: {point.step for point in self.client.get_metric_history(run_id, f"{prefix}/{name}")} for name in columns
        }
        self._log(
            run_id,
            [
                Metric(f"{prefix}/{name}", float(row[name]), int(row["time_s"] * 1000), int(row["step"]))
                for row in history.to_dict("records")
                for name in columns
                if int(row["step"]) not in logged[name]
            ],
        )

    def _log(self, run_id: str, metrics: list[Metric]) -> None:
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + BATCH])

    def _inputs(self, run_id: str, datasets: Iterable[DatasetInput]) -> None:
        self.client.log_inputs(run_id, datasets=list(datasets))

    def _tables(self, run_id: str, files: dict[str, Path]) -> None:
        for path in files.values():
            self.client.log_artifact(run_id, str(path), "tables")


class LiveCurve:
    """The figures of a training, sent to MLflow in batches while it runs.

    A server that does not answer costs nothing here: whatever is missing is logged from the training's own record when it
    has ended.
    """

    def __init__(self, client: MlflowClient, run_id: str, prefix: str) -> None:
        self._client, self._run_id, self._prefix = client, run_id, prefix
        self._waiting: list[Metric] = []
        self._sent = 0.0

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        moment = int(time.time() * 1000)
        self._waiting += [Metric(f"{self._prefix}/{name}", value, moment, step) for name, value in figures.items()]
        if time.monotonic() - self._sent < LIVE_INTERVAL_S:
            return
        self._sent = time.monotonic()
        sending, self._waiting = self._waiting, []
        with suppress(MlflowException, OSError):
            self._client.log_batch(self._run_id, metrics=sending[:BATCH])


def _report(stage: Stage, kind: type[R]) -> R:
    report = stage.finished(kind)
    assert report is not None, f"stage {stage.name} is recorded before it has finished"
    return report


def _dataset(stage: Stage, context: str, uri: str | None = None) -> DatasetInput:
    """A stage's images as an MLflow data set, identified by the stage's digest; ``uri`` where they are not in its folder."""
    if stage.name == "source":
        real = _report(stage, SourceReport)
        count = real.num_test if context == "evaluation" else real.num_train
        name, profile = f"{'test' if context == 'evaluation' else 'training'} images", {"num_rows": count}
    else:
        name, profile = "synthetic images", {"num_rows": _report(stage, SamplesReport).num_images}
    entity = Dataset(
        name=name,
        digest=stage.digest[:16],
        source_type="s3" if uri and uri.startswith("s3://") else "local",
        source=json.dumps({"uri": uri or stage.folder.as_uri()}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset=entity, tags=[InputTag("mlflow.data.context", context)])
