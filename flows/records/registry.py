"""The one module that writes to MLflow's model registry."""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlflow
import mlflow.onnx as onnx_flavor
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from flows.plan import Plan, model_name
from flows.records.champions import ChangeName, claim_decision, find_champion
from flows.records.notes import VersionRow, describe_model, summarise_card
from flows.records.released import GATE_TAG, OTHER_RECORD, read_decision
from flows.records.tracking import DIGEST_TAG, Tracker
from proxyrob.compare import Comparison, GateDecision, compare_verdicts, decide_promotion
from proxyrob.compare.tables import Verdicts
from proxyrob.evaluate import SanityReport, VerdictHeader, read_verdicts
from proxyrob.evaluate.verdicts import VERDICTS
from proxyrob.export import CARD, CARD_JSON, MODEL, ExportReport, ModelCard
from proxyrob.models import read_onnx
from proxyrob.source import read_split
from proxyrob.storage import Report
from proxyrob.storage.bounded import parse_json, read_small
from proxyrob.storage.files import read_frame, read_header
from proxyrob.types import as_images

CHALLENGER = "challenger"
VERDICT_TAG, WAIVED_TAG = "gate.verdict", "gate.waived."
AGAIN_TAG, WITHDRAWN_TAG = "attacked-again", "champion.withdrawn"
LONGEST_DESCRIPTION = 5000
"""What MLflow's database keeps of a version's description; a longer card lies whole beside the model."""
LISTED_VERSIONS = 12


class Registration(Report):
    """A registered version, its aliases, what the gate said of it, and what that has just changed about the champion."""

    name: str
    version: int
    aliases: tuple[str, ...]
    decision: GateDecision
    change: ChangeName | None = None


@dataclass(frozen=True)
class Champion:
    """A registered model's champion: its version, the run of its pipeline, and the verdicts it was registered with."""

    name: str
    version: int
    parent_run: str
    verdicts: Verdicts


def register_model(plan: Plan, tracker: Tracker, run_id: str) -> Registration:
    """Register the plan's exported model, make it challenger, and champion if the gate says PASS.

    Done once for each exported model: a repeated call finds the version and its decision. Where the gate's settings or the
    sanity checks have changed since, it decides again, and a champion that then FAILs is champion no longer. Of several runs
    that do it at the same moment each is compared with the champion that the one before it left. ``run_id`` is the MLflow run
    of the released variant.
    """
    client, name = tracker.client, model_name(plan.config)
    with claim_decision(client, name) as claim:
        found = _find_version(client, name, plan.export.digest)
        if found is None:
            found = _register(plan, tracker, run_id, name)
        number = int(found.version)
        if (decision := _stored_decision(plan, found)) is not None:
            return Registration(name=name, version=number, aliases=_aliases(client, name, number), decision=decision)
        client.set_registered_model_alias(name, CHALLENGER, str(number))
        decision = _decide(plan, tracker, name, number)
        _record_decision(client, found, decision, _card(plan), plan.export.verified(CARD).read_text())
        change: ChangeName | None = None
        if decision.verdict == "PASS":
            change = "promoted" if claim.promote(number, decision.reason) else None
            if WITHDRAWN_TAG in found.tags:
                client.delete_model_version_tag(name, str(number), WITHDRAWN_TAG)
        elif decision.verdict == "FAIL" and claim.withdraw(number, decision.reason):
            change = "withdrawn"
            client.set_model_version_tag(name, str(number), WITHDRAWN_TAG, decision.reason)
        _describe(client, name)
        aliases = _aliases(client, name, number)
        return Registration(name=name, version=number, aliases=aliases, decision=decision, change=change)


def find_registered_champion(tracker: Tracker, name: str) -> Champion | None:
    """The champion of a registered model with what it was registered with, or ``None`` where there is none."""
    version = find_champion(tracker.client, name)
    if version is None:
        return None
    assert version.run_id is not None
    parent = tracker.client.get_run(version.run_id).data.tags["mlflow.parentRunId"]
    return Champion(name, int(version.version), parent, _download_verdicts(tracker, version))


def judge_champion(tracker: Tracker, champion: Champion, found: Comparison, reason: str) -> bool:
    """Write on a champion what attacking it again found, and take the alias back where that is FAIL; whether it was."""
    number = str(champion.version)
    tracker.client.set_model_version_tag(champion.name, number, AGAIN_TAG, found.model_dump_json())
    if found.verdict != "FAIL":
        return False
    with claim_decision(tracker.client, champion.name) as claim:
        withdrawn = claim.withdraw(champion.version, reason)
    if withdrawn:
        tracker.client.set_model_version_tag(champion.name, number, WITHDRAWN_TAG, reason)
        described = tracker.client.get_model_version(champion.name, number).description or ""
        note = f"**No longer champion:** {reason}\n\n{described}"
        tracker.client.update_model_version(champion.name, number, description=note[:LONGEST_DESCRIPTION])
        _describe(tracker.client, champion.name)
    return withdrawn


def _find_version(client: MlflowClient, name: str, digest: str) -> ModelVersion | None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = client.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'")
    return client.get_model_version(name, str(found[0].version)) if found else None


def _stored_decision(plan: Plan, version: ModelVersion) -> GateDecision | None:
    """What the gate said of a version, unless its settings or the sanity checks have changed since."""
    decision = read_decision(version)
    if decision is None:
        return None
    found, gate = decision.comparison, plan.config.gate
    same_margin = found is None or (found.margin, found.confidence) == (gate.margin, gate.confidence)
    failed = tuple(check.name for check in _sanity(plan).having("failed"))
    same_checks = (decision.failed_checks, decision.waivers) == (failed, gate.waivers)
    return decision if same_margin and same_checks else None


def _record_decision(client: MlflowClient, version: ModelVersion, decision: GateDecision, card: ModelCard, text: str) -> None:
    """Write a decision, and every failed check that was waived for it, to the tags and the description of a version.

    The description is the card; its first line, which is all that lists of versions show, says what matters most.
    """
    name, number = version.name, str(version.version)
    waived = {f"{WAIVED_TAG}{check}": reason for check, reason in decision.waived.items()}
    for tag in version.tags:
        if tag.startswith(WAIVED_TAG) and tag not in waived:
            client.delete_model_version_tag(name, number, tag)
    tags = {GATE_TAG: decision.model_dump_json(), VERDICT_TAG: decision.verdict, **waived}
    for tag, value in tags.items():
        client.set_model_version_tag(name, number, tag, value)
    headline = f"Gate {decision.verdict} · {summarise_card(card)}"
    description = f"{headline}\n\n{text}\n{decision.describe()}"
    if len(description) > LONGEST_DESCRIPTION:
        description = f"{headline}\n\n{decision.describe()}"[:LONGEST_DESCRIPTION]
    client.update_model_version(name, number, description=description)


def _describe(client: MlflowClient, name: str) -> None:
    """Write the page of a registered model: how to use it, its versions, who is champion."""
    model = client.get_registered_model(name)
    versions = [client.get_model_version(name, found.version) for found in client.search_model_versions(f"name = '{name}'")]
    versions.sort(key=lambda version: -int(version.version))
    rows = [
        VersionRow(
            number=int(version.version),
            aliases=tuple(sorted(alias for alias, held in model.aliases.items() if int(held) == int(version.version))),
            threat=version.tags.get("threat_model", ""),
            autoattack=version.tags.get("autoattack_accuracy", ""),
            clean=version.tags.get("clean_accuracy", ""),
            verdict=version.tags.get(VERDICT_TAG, ""),
        )
        for version in versions[:LISTED_VERSIONS]
    ]
    client.update_registered_model(name, describe_model(name, rows, len(versions)))


def _register(plan: Plan, tracker: Tracker, run_id: str, name: str) -> ModelVersion:
    mlflow.set_tracking_uri(tracker.uri)  # MLflow asks for what models:/… means there, whatever its client was given
    mlflow.set_registry_uri(tracker.uri)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logged = tracker.patience.outlast(_log_model, plan, tracker, run_id)
    card = _card(plan)
    measured = {"autoattack_accuracy": card.autoattack, "pgd_accuracy": card.pgd, "clean_accuracy": card.clean}
    tags = {
        **{name: f"{figure.value:.4f}" for name, figure in measured.items()},
        "threat_model": card.threat,
        "test_images": str(card.autoattack.n),
        DIGEST_TAG: plan.export.digest,
    }
    return tracker.patience.outlast(_find_or_make_version, tracker.once, name, logged, run_id, tags)


def _find_or_make_version(
    client: MlflowClient, name: str, logged: LoggedModel, run_id: str, tags: dict[str, str]
) -> ModelVersion:
    """Looks first, whenever it is repeated: a server that went away may have made the version before."""
    if (found := _find_version(client, name, tags[DIGEST_TAG])) is not None:
        return found
    return client.create_model_version(name, logged.model_uri, run_id=run_id, model_id=logged.model_id, tags=tags)


def _log_model(plan: Plan, tracker: Tracker, run_id: str) -> LoggedModel:
    """The exported model among those of the run that it belongs to, with files and card; whatever was begun is completed."""
    card = _card(plan)
    channels, height, width = card.image_shape
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("float32"), (-1, channels, height, width), "images")]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, len(card.class_names)), "logits")]),
    )
    example = as_images(read_split(plan.source, "train").stored[:2]).numpy()
    client, run = tracker.once, tracker.once.get_run(run_id)
    known = f"tags.`{DIGEST_TAG}` = '{plan.export.digest}' AND source_run_id = '{run_id}'"
    begun = client.search_logged_models([run.info.experiment_id], known, max_results=1)
    model = (
        begun[0]
        if begun
        else client.create_logged_model(  # where the run is: MLflow's default is the working directory
            run.info.experiment_id,
            name="model",
            source_run_id=run_id,
            params=run.data.params,
            tags={DIGEST_TAG: plan.export.digest},
        )
    )
    if model.status != LoggedModelStatus.READY:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            onnx_flavor.save_model(
                read_onnx(plan.export.verified(MODEL)),
                str(folder),
                mlflow_model=Model(model.artifact_location, run_id, model_uuid=model.model_id, model_id=model.model_id),
                signature=signature,
                input_example={"images": example},
                pip_requirements=["onnxruntime", "numpy"],
                onnx_execution_providers=["CPUExecutionProvider"],
                save_as_external_data=False,
                extra_files=[str(plan.export.verified(file)) for file in (CARD, CARD_JSON)],
            )
            client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    if model.model_id not in {output.model_id for output in (run.outputs.model_outputs if run.outputs else ())}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    tracker.record_released(plan, run_id, model.model_id)
    return client.get_logged_model(model.model_id)


def _card(plan: Plan) -> ModelCard:
    path = plan.export.verified(CARD_JSON)
    content = parse_json(read_small(path), str(path), plan.export.remedy)
    return ModelCard.model_validate({key: value for key, value in content.items() if key in ModelCard.model_fields})


def _sanity(plan: Plan) -> SanityReport:
    report = plan.variants[plan.released].sanity.finished(SanityReport)
    assert report is not None
    return report


def _decide(plan: Plan, tracker: Tracker, name: str, number: int) -> GateDecision:
    exported = plan.export.finished(ExportReport)
    assert exported is not None
    reference, comparison, fault = _compare(plan, tracker, name, number)
    return decide_promotion(
        comparison,
        reference=reference,
        parity_passed=exported.parity.passed,
        sanity=_sanity(plan),
        waivers=plan.config.gate.waivers,
        incomparable=fault,
    )


def _compare(plan: Plan, tracker: Tracker, name: str, number: int) -> tuple[str, Comparison | None, str | None]:
    """Against the champion where there is one, else against the model trained on real images alone."""
    ours = read_verdicts(plan.variants[plan.released].evaluate)
    champion, gate = find_champion(tracker.client, name), plan.config.gate
    if champion is not None and int(champion.version) == number:
        champion = None
    if champion is None and plan.released == "real-only":
        return "nothing: it is the first version", None, None
    reference = "the same training on real images alone" if champion is None else f"champion (version {champion.version})"
    try:
        theirs = (
            read_verdicts(plan.variants["real-only"].evaluate) if champion is None else _download_verdicts(tracker, champion)
        )
        found = compare_verdicts(ours, theirs, margin=gate.margin, confidence=gate.confidence)
    except (ValueError, MlflowException) as error:
        if tracker.patience.is_away(error):  # which decides nothing, and is no property of the model
            raise
        return reference, None, str(error)
    return reference, found["autoattack"], None


def _download_verdicts(tracker: Tracker, version: ModelVersion) -> Verdicts:
    assert version.run_id is not None
    with tempfile.TemporaryDirectory() as folder:
        path = tracker.download(version.run_id, f"tables/{VERDICTS}", Path(folder))
        return read_frame(path, OTHER_RECORD), read_header(path, VerdictHeader, OTHER_RECORD)


def _aliases(client: MlflowClient, name: str, number: int) -> tuple[str, ...]:
    aliases = client.get_registered_model(name).aliases
    return tuple(sorted(alias for alias, held in aliases.items() if int(held) == number))
