"""What a soak left behind: whether every image is there exactly once, records agree with tables, and nothing is orphaned."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow import MlflowClient

from flows.plan import Plan, model_name, pin_config, plan_pipeline
from flows.records.champions import LOCK_SUFFIX, find_champion, read_history
from flows.records.curves import ROBUST_CURVE, SMOOTH_CURVE
from flows.records.metrics import variant_metrics
from flows.records.released import GATE_TAG
from flows.records.tracking import DIGEST_TAG, FINISHED
from flows.settings import Settings
from proxyrob.certify import read_certificates
from proxyrob.config import load_config
from proxyrob.evaluate import read_verdicts
from proxyrob.evaluate.verdicts import VERDICTS
from proxyrob.shards import read_manifest, read_shard, read_side_index, read_side_table
from proxyrob.source import source_report
from proxyrob.storage import open_store
from proxyrob.train import read_curve
from proxyrob.train import read_history as read_losses
from tests.composed import Services

TIMED = ["elapsed_s"]  # columns that say how long something took
NEVER_STARTED = "NotReady"  # how Prefect leaves, for good, the tasks after one that failed
UNFINISHED = {"type": {"any_": ["RUNNING", "PENDING", "SCHEDULED", "CANCELLING", "PAUSED"]}}


def plan_of(settings: Settings, preset: str, changes: tuple[str, ...]) -> Plan:
    """The plan of a run."""
    config = pin_config(load_config(preset, changes), settings)
    return plan_pipeline(config, settings.store, settings.place)


def count_images(plan: Plan) -> dict[str, int]:
    """How many images a finished run should have, how many rows are missing, and how many are there twice, over all tables.

    Every shard and table is read through its hash, so a damaged one is an error here.
    """
    wanted = missing = twice = 0

    def count(ids: Iterable[int], expected: Iterable[int]) -> None:
        nonlocal wanted, missing, twice
        found, all_ids = Counter(ids), set(expected)
        wanted += len(all_ids)
        missing += len(all_ids - found.keys())
        twice += sum(found.values()) - len(all_ids & found.keys())

    for proxy in plan.proxies:
        manifest, ids = read_manifest(proxy.images_at), range(proxy.config.num_images or 0)
        drawn = []
        for shard in manifest.shards:
            images = read_shard(proxy.images_at, shard, manifest.image_shape)
            drawn += range(shard.first_id, shard.first_id + len(images))
        count(drawn, ids)
        index = read_side_index(proxy.labels_at, manifest)
        count(pd.concat([read_side_table(proxy.labels_at, table, ["id"]) for table in index.tables]).id, ids)
    num_test = source_report(plan.source).num_test
    for stages in plan.variants.values():
        verdicts, _ = read_verdicts(stages.evaluate)
        count(verdicts["index"][verdicts.clean_prediction.notna()], range(num_test))
        count(read_certificates(stages.certify)[0]["index"], range(plan.config.certify.num_images))
    return {"images": wanted, "lost": missing, "twice": twice}


def compare_tables(plan: Plan, undisturbed: Plan) -> list[str]:
    """The tables of a run that differ from those of the same run that nobody disturbed."""
    different = []
    for variant, stages in plan.variants.items():
        others = undisturbed.variants[variant]
        for name, ours, theirs in (
            ("verdicts", read_verdicts(stages.evaluate)[0], read_verdicts(others.evaluate)[0]),
            ("certificates", read_certificates(stages.certify)[0], read_certificates(others.certify)[0]),
        ):
            if not ours.drop(columns=TIMED, errors="ignore").equals(theirs.drop(columns=TIMED, errors="ignore")):
                different.append(f"{variant} {name}")
    return different


def check_record(client: MlflowClient, plan: Plan) -> list[str]:
    """What MLflow says of a finished run that its tables do not say."""
    experiment = client.get_experiment_by_name(plan.config.name)
    assert experiment is not None
    faults = []
    parents = client.search_runs([experiment.experiment_id], f"tags.`{DIGEST_TAG}` = '{plan.digest}'")
    if [run.info.status for run in parents] != [FINISHED]:
        faults.append(f"{len(parents)} parent runs, {[run.info.status for run in parents]}")
    for variant, stages in plan.variants.items():
        runs = client.search_runs([experiment.experiment_id], f"tags.`{DIGEST_TAG}` = '{stages.evaluate.digest}'")
        if [run.info.status for run in runs] != [FINISHED]:
            faults.append(f"{variant}: {len(runs)} runs, {[run.info.status for run in runs]}")
            continue
        for name, value in variant_metrics(plan, variant).items():
            if abs(runs[0].data.metrics.get(name, np.nan) - value) > 1e-12 or name not in runs[0].data.metrics:
                faults.append(f"{variant}: {name} is {runs[0].data.metrics.get(name)}, its table says {value}")
        for prefix, stage in ((ROBUST_CURVE, stages.train), (SMOOTH_CURVE, stages.smooth)):
            for curve in (read_losses(stage), read_curve(stage)):
                for column in set(curve.columns) - {"step", "time_s"}:
                    points = [point.step for point in client.get_metric_history(runs[0].info.run_id, f"{prefix}/{column}")]
                    if sorted(points) != sorted(int(step) for step in curve.step):
                        faults.append(f"{variant}: {prefix}/{column} has {len(points)} points, its record {len(curve)}")
        downloaded = Path(client.download_artifacts(runs[0].info.run_id, f"tables/{VERDICTS}"))
        if downloaded.read_bytes() != stages.evaluate.verified(VERDICTS).read_bytes():
            faults.append(f"{variant}: the verdicts in MLflow are others than those of the stage")
    return faults


def check_registry(client: MlflowClient, plans: list[Plan]) -> list[str]:
    """Whether each finished run has one version with a decision, and the champion is who the history says it is."""
    name, faults = model_name(plans[0].config), []
    versions = client.search_model_versions(f"name = '{name}'")
    for plan in plans:
        own = [version for version in versions if version.tags.get(DIGEST_TAG) == plan.export.digest]
        if len(own) != 1 or GATE_TAG not in own[0].tags:
            faults.append(f"{plan.run_name}: {len(own)} versions, decided: {[GATE_TAG in version.tags for version in own]}")
    if len(versions) != len(plans):
        faults.append(f"{len(versions)} versions of {len(plans)} finished runs")
    champion, history = find_champion(client, name), read_history(client, name)
    last = history[-1] if history else None
    said = last.version if last is not None and last.event == "promoted" else None
    if said != (int(champion.version) if champion else None):
        faults.append(f"the history says version {said} is champion, the alias is {champion.version if champion else None}")
    return faults


def find_orphans(services: Services, client: MlflowClient, settings: Settings) -> list[str]:
    """Runs, tasks, slots, claims, locks and half-written files that belong to nobody any more."""
    found = []
    for kind in ("flow_runs", "task_runs"):
        left = services.ask(f"{kind}/filter", {kind: {"state": UNFINISHED}}).content
        names = [f"{run['name']} {run['state']['name']}" for run in left if run["state"]["name"] != NEVER_STARTED]
        if names:
            found.append(f"{len(names)} {kind.replace('_', ' ')} of Prefect's that have not ended: {', '.join(names[:5])}")
    limits = services.ask("v2/concurrency_limits/filter", {}).content
    found += [f"{limit['active_slots']:g} slots of {limit['name']} are taken" for limit in limits if limit["active_slots"]]
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    if running := client.search_runs(experiments, "attributes.status = 'RUNNING'"):
        found.append(f"{len(running)} runs of MLflow's that are RUNNING")
    if locks := [model.name for model in client.search_registered_models() if model.name.endswith(LOCK_SUFFIX)]:
        found.append(f"locks in the registry: {locks}")
    if claims := [item.key for item in open_store(settings.place.uri).list() if "claims/" in item.key]:
        found.append(f"claims in the store: {claims}")
    folders = [path for path in settings.store.rglob("scratch") if (path.parent / "stage.json").is_file()]
    if folders:
        found.append(f"{len(folders)} scratch folders of finished stages")
    if parts := [str(path) for path in settings.home.rglob("*.part")]:
        found.append(f"half-written files: {parts}")
    uploads = services.s3.client().list_multipart_uploads(Bucket="proxyrob").get("Uploads", [])
    if uploads:
        found.append(f"{len(uploads)} unfinished uploads on S3")
    return found


def describe_state(run: dict[str, Any]) -> str:
    """A flow run's last state with what it says."""
    message = (run["state"].get("message") or "").splitlines()
    return run["state"]["name"] + (f": {message[0][:200]}" if message else "")


def dump(path: Path, content: Any) -> None:
    """Write JSON that a person can read."""
    path.write_text(json.dumps(content, indent=1) + "\n")
