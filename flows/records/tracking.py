"""The one module that writes runs to MLflow. Every call may be repeated: a resumed pipeline goes on in the same runs."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Experiment, Metric, Param, Run
from mlflow.exceptions import MlflowException
from PIL import Image

from flows.plan import Plan, ProxyStages, Variant
from flows.records.curves import ROBUST_CURVE, SMOOTH_CURVE, LiveCurve, log_history, log_metrics
from flows.records.datasets import describe_dataset, report_of
from flows.records.metrics import name_figures, variant_metrics
from flows.records.notes import MEASUREMENTS, describe_experiment, describe_proxy, describe_variant, show_pictures
from flows.records.patience import Patience, Tell, patient_client, summarise, tell_stderr
from flows.records.versions import git_commit, library_versions
from flows.records.views import write_views
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
from proxyrob.storage import Stage
from proxyrob.train import TrainReport, read_curve, read_history

FINISHED, FAILED, RUNNING = "FINISHED", "FAILED", "RUNNING"
DIGEST_TAG, NOTE_TAG, PARENT_TAG = "proxyrob.digest", "mlflow.note.content", "mlflow.parentRunId"
LEAST_PATIENCE_S = 10.0
"""How long a run that has failed waits for the server to take that down."""


class Tracker:
    """MLflow runs of pipelines: one parent for each pipeline, one child for the proxy and for each model.

    ``client`` outlasts a server that is away, and ``tell`` says so; ``once`` is for what may not be repeated blindly.
    """

    def __init__(self, settings: Settings, tell: Tell = tell_stderr) -> None:
        self.uri = settings.resolved_tracking_uri
        self._artifacts = settings.artifacts if settings.tracking_uri is None else None
        self._tell = tell
        self.patience = Patience(self.uri, tell)
        self.once = MlflowClient(self.uri, self.uri)
        self.client = patient_client(self.once, self.patience)
        if self._artifacts is not None:
            self._artifacts.mkdir(parents=True, exist_ok=True)
            with FileLock(self._artifacts.parent / ".first-use.lock"):  # two first users at once would both make the tables
                self.client.search_experiments(max_results=1)

    def experiment(self, name: str) -> str:
        """The experiment of a preset, made on first use."""
        return self.patience.outlast(self._find_or_make_experiment, name).experiment_id

    def _find_or_make_experiment(self, name: str) -> Experiment:
        found = self.once.get_experiment_by_name(name)
        if found is None:
            location = None if self._artifacts is None else (self._artifacts / name).as_uri()
            kind = {"mlflow.experimentKind": "custom_model_development"}
            try:
                self.once.create_experiment(name, artifact_location=location, tags=kind)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was faster
                    raise
            found = self.once.get_experiment_by_name(name)
            assert found is not None
            self.once.set_experiment_tag(found.experiment_id, NOTE_TAG, describe_experiment(name, found.experiment_id))
        return found

    def open_pipeline(self, plan: Plan, title: str, device: str) -> str:
        """The parent run of a plan: the one that is there already, or a new one."""
        tags = {
            "proxyrob.kind": "pipeline",
            "proxyrob.device": device,
            **({"mlflow.source.git.commit": commit} if (commit := git_commit()) else {}),
            "proxyrob.versions": ", ".join(f"{name} {number}" for name, number in library_versions().items()),
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
            run = self._open(
                plan, self._child_name(plan, name, parent), proxy.samples.digest, {"proxyrob.kind": "proxy"}, parent
            )
            if run.info.status != FINISHED:
                self._record_proxy(plan, proxy, run)

    def _record_proxy(self, plan: Plan, proxy: ProxyStages, run: Run) -> None:
        run_id = run.info.run_id
        samples, labels = report_of(proxy.samples, SamplesReport), report_of(proxy.labels, LabelReport)
        figures = {
            "synthetic_images": samples.num_images,
            "labelers_disagree": labels.num_disagree / labels.num_images,
            "kept": labels.num_kept / labels.num_images,
            "near_test_images": labels.num_leaked,
            "constant_images": samples.constant_images,
            "suspicious_shards": len(labels.suspicious_shards),
        }
        if proxy.fit is not None and (loss := report_of(proxy.fit, ProxyReport).final_loss) is not None:
            figures["proxy_loss"] = loss
        self._params(
            run,
            {key: value for key, value in flatten(plan.config).items() if key.startswith(("proxy.", "sampling.", "label."))},
        )
        self._metrics(run_id, figures, proxy.labels)
        self._inputs(run_id, [describe_dataset(plan.source, "training")])
        self.client.log_text(run_id, read_manifest(proxy.images_at).content().decode(), "tables/manifest.json")
        self.client.set_tag(run_id, "proxyrob.images", proxy.images_at.uri)
        self._say_held(run_id, *([] if proxy.fit is None else [proxy.fit]), proxy.samples, proxy.labels)
        self.client.set_tag(run_id, NOTE_TAG, describe_proxy(proxy.name, figures))
        self.client.set_terminated(run_id, FINISHED)

    def open_variant(self, plan: Plan, variant: Variant, parent: str) -> str:
        """The child run of a model, made before it is trained so that its curves can be watched. Returns its id."""
        return self._open_variant(plan, variant, parent).info.run_id

    def _open_variant(self, plan: Plan, variant: Variant, parent: str) -> Run:
        digest, name = plan.variants[variant].evaluate.digest, self._child_name(plan, variant, parent)
        return self._open(plan, name, digest, {"proxyrob.kind": "model"}, parent)

    def live_curve(self, run_id: str, prefix: str) -> LiveCurve:
        """Takes the figures of a training while it runs."""
        return LiveCurve(self.once, run_id, prefix, self._tell)

    def record_variant(self, plan: Plan, variant: Variant, parent: str) -> str:
        """The child run of a model: curves, accuracies with intervals, certificates, tables. Returns its id."""
        stages = plan.variants[variant]
        run = self._open_variant(plan, variant, parent)
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
        for prefix, stage in ((ROBUST_CURVE, stages.train), (SMOOTH_CURVE, stages.smooth)):
            for history in (read_history(stage), read_curve(stage)):
                log_history(self.client, run_id, prefix, history)
        trained = report_of(stages.train, TrainReport)
        validated = {
            "validation_accuracy": trained.validation_correct,
            "validation_pgd_accuracy": trained.validation_pgd_correct,
        }
        shares = {name: measure_share(n, trained.num_validation) for name, n in validated.items() if n is not None}
        self._metrics(run_id, name_figures(shares), stages.train)
        self._metrics(run_id, variant_metrics(plan, variant), stages.certify)
        sanity = report_of(stages.sanity, SanityReport)
        self.client.set_tag(run_id, "proxyrob.sanity", "passed" if sanity.passed else "failed")
        self.client.set_tag(run_id, NOTE_TAG, describe_variant(plan, variant))
        self._say_held(run_id, stages.train, stages.smooth, stages.evaluate, stages.sanity, stages.certify)
        inputs = [describe_dataset(plan.source, "training"), describe_dataset(plan.source, "evaluation")]
        if variant == "mixed":
            inputs += [describe_dataset(proxy.samples, "training", proxy.images_at.uri) for proxy in plan.proxies]
        self._inputs(run_id, inputs)
        self._tables(
            run_id, {VERDICTS: stages.evaluate.verified(VERDICTS), CERTIFICATES: stages.certify.verified(CERTIFICATES)}
        )
        self.client.log_dict(run_id, sanity.model_dump(mode="json"), "sanity.json")
        return run_id

    def record_released(self, plan: Plan, run_id: str, model_id: str) -> None:
        """Say that the figures of a model's run are those of the model that was exported."""
        self._metrics(run_id, variant_metrics(plan, plan.released), plan.variants[plan.released].certify, model_id)

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
        pictures = report_of(plan.pictures, PicturesReport).names
        self._pictures(run_id, [plan.pictures.verified(name) for name in pictures])
        self.client.log_dict(run_id, report, "report.json")
        self.client.log_text(run_id, yaml.safe_dump(plan.config.dump(), sort_keys=False), "configuration.yaml")
        registered = report["registered"]
        name, version = registered["name"], registered["version"]
        link = f"[The card of {name} version {version}](#/models/{name}/versions/{version})"
        tags = {
            NOTE_TAG: f"{note}\n\n{link}\n\n{show_pictures(run_id, pictures)}",
            "proxyrob.gate": report["promotion"]["verdict"],
            "proxyrob.model": f"{name} version {version}",
        }
        for tag, value in tags.items():
            self.client.set_tag(run_id, tag, value)
        self._inputs(run_id, [describe_dataset(plan.source, "training")])
        self._show(plan, run_id, pictures)
        self.client.set_terminated(run_id, FINISHED)

    def _pictures(self, run_id: str, files: Iterable[Path]) -> None:
        """As files to be kept, and as pictures that MLflow shows beside those of other runs."""
        there = [entry.path for entry in self.client.list_artifacts(run_id, "images")]
        for path in files:
            self.client.log_artifact(run_id, str(path), "figures")
            if not any(entry.startswith(f"images/{path.stem}+") and "+compressed" in entry for entry in there):  # written last
                self.client.log_image(run_id, Image.open(path).convert("RGB"), key=path.stem, step=0, synchronous=True)

    def _show(self, plan: Plan, run_id: str, pictures: Iterable[str]) -> None:
        """Write the views of the experiment, for the metrics that this pipeline has."""
        experiment = self.client.get_experiment(self.experiment(plan.config.name))
        children = self._children(experiment.experiment_id, run_id)
        metrics = {name for run in (self.client.get_run(run_id), *children) for name in run.data.metrics}
        views = write_views(metrics, [Path(name).stem for name in pictures], int(time.time() * 1000))
        for tag, value in views.items():
            self.client.set_experiment_tag(experiment.experiment_id, tag, value)

    def _children(self, experiment: str, parent: str) -> list[Run]:
        return list(self.client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{parent}'"))

    def record_measurement(
        self, stage: Stage, measurement: Measurement, figures: dict[str, float], params: dict[str, Any], files: Iterable[Path]
    ) -> str:
        """A run of its own for one measurement of a model, whoever trained it: figures, tables, pictures and card.

        A repeated call finds the run. Returns its id.
        """
        experiment = self.experiment(MEASUREMENTS)
        tags = {
            "proxyrob.kind": "measurement",
            DIGEST_TAG: stage.digest,
            NOTE_TAG: render_measurement(measurement),
            **{f"proxyrob.digest.{name}": digest for name, digest in measurement.digests.items()},
            **({"mlflow.source.git.commit": commit} if (commit := git_commit()) else {}),
        }
        if measurement.sanity is not None:
            tags["proxyrob.sanity"] = "passed" if measurement.sanity.passed else "failed"
        known = f"tags.`{DIGEST_TAG}` = '{stage.digest}'"
        run = self.patience.outlast(self._find_or_make_run, experiment, known, measurement.model, tags)
        if run.info.status == FINISHED:
            return run.info.run_id
        self._params(run, params)
        self._metrics(run.info.run_id, figures, stage)
        folders = {".parquet": "tables", ".png": "figures"}
        for path in files:
            self.client.log_artifact(run.info.run_id, str(path), folders.get(path.suffix))
        self.client.set_terminated(run.info.run_id, FINISHED)
        return run.info.run_id

    def fail(self, run_id: str, reason: str) -> None:
        """Mark a pipeline as failed, with the reason on its page; a later run with the same configuration reopens it.

        Where the server is away that is said, and nothing more: the reason is what the user has to see.
        """
        patience = Patience(self.uri, self._tell, LEAST_PATIENCE_S)
        client = patient_client(self.once, patience)
        try:
            client.set_tag(run_id, NOTE_TAG, f"**Failed:** {reason}")
            experiment = client.get_run(run_id).info.experiment_id
            for child in client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{run_id}'"):
                if child.info.status == RUNNING:
                    client.set_terminated(child.info.run_id, FAILED)
            client.set_terminated(run_id, FAILED)
        except (MlflowException, OSError) as error:
            self._tell(f"that the run failed is not recorded in MLflow ({summarise(error)})")

    def download(self, run_id: str, path: str, folder: Path) -> Path:
        """Fetch one artifact of a run."""
        return Path(self.client.download_artifacts(run_id, path, str(folder)))

    def _open(self, plan: Plan, name: str, digest: str, tags: dict[str, str], parent: str | None = None) -> Run:
        experiment = self.experiment(plan.config.name)
        belongs = f"tags.`{PARENT_TAG}` = '{parent}'" if parent else "tags.`proxyrob.kind` = 'pipeline'"
        tags = {
            **tags,
            DIGEST_TAG: digest,
            "mlflow.source.name": f"proxyrob run {plan.config.name}",
            "mlflow.source.type": "LOCAL",
            **({PARENT_TAG: parent} if parent else {}),
        }
        known = f"tags.`{DIGEST_TAG}` = '{digest}' and {belongs}"
        run = self.patience.outlast(self._find_or_make_run, experiment, known, name, tags)
        if run.info.status not in (FINISHED, RUNNING):
            self.client.update_run(run.info.run_id, status=RUNNING)
        return run

    def _find_or_make_run(self, experiment: str, known: str, name: str, tags: dict[str, str]) -> Run:
        """Looks first, whenever it is repeated: a server that went away may have made the run before."""
        found = self.once.search_runs([experiment], known, max_results=1)
        return found[0] if found else self.once.create_run(experiment, run_name=name, tags=tags)

    def _child_name(self, plan: Plan, name: str, parent: str) -> str:
        """With what sets its pipeline apart, so that runs of several can be told from one another."""
        title = self.client.get_run(parent).info.run_name or ""
        return f"{name} · {title.removeprefix(plan.config.name).strip()}"

    def _params(self, run: Run, values: dict[str, Any]) -> None:
        params = [Param(key, json.dumps(value) if isinstance(value, list) else str(value)) for key, value in values.items()]
        missing = [param for param in params if param.key not in run.data.params]
        for start in range(0, len(missing), 100):
            self.client.log_batch(run.info.run_id, params=missing[start : start + 100])

    def _metrics(self, run_id: str, figures: dict[str, float], stage: Stage, model_id: str | None = None) -> None:
        """Stamped with the time the stage ended, so that logging them again adds nothing."""
        record = stage.record()
        assert record is not None
        moment = int(record.finished_at * 1000)
        metrics = [Metric(name, value, moment, 0, model_id=model_id, run_id=run_id) for name, value in figures.items()]
        log_metrics(self.client, run_id, metrics)

    def _say_held(self, run_id: str, *stages: Stage) -> None:
        """How many images each stage held at once for which memory had run out."""
        for tag, value in held_at_once_tags(*stages).items():
            self.client.set_tag(run_id, tag, value)

    def _inputs(self, run_id: str, datasets: Iterable[DatasetInput]) -> None:
        self.client.log_inputs(run_id, datasets=list(datasets))

    def _tables(self, run_id: str, files: dict[str, Path]) -> None:
        for path in files.values():
            self.client.log_artifact(run_id, str(path), "tables")


def held_at_once_tags(*stages: Stage) -> dict[str, str]:
    """Tags that say how many images each finished stage held at once for which memory had run out."""
    records = {stage.name: stage.record() for stage in stages}
    held = {name: record.held_at_once for name, record in records.items() if record is not None}
    return {f"proxyrob.held_at_once.{name}": str(number) for name, number in held.items() if number is not None}
