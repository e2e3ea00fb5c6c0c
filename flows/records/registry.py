"""The one module that writes to MLflow's model registry."""

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlflow
import mlflow.onnx as onnx_flavor
import numpy as np
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from pydantic import ValidationError

from flows.plan import DIGEST, Plan, model_name
from flows.records.champions import CHAMPION, claim_decision, find_champion
from flows.records.metrics import name_figures
from flows.records.tracking import DIGEST_TAG, Tracker
from proxyrob.compare import Comparison, GateDecision, compare_verdicts, decide_promotion
from proxyrob.compare.tables import Verdicts
from proxyrob.errors import DataIntegrityError
from proxyrob.evaluate import SanityReport, VerdictHeader, read_verdicts
from proxyrob.evaluate.verdicts import VERDICTS
from proxyrob.export import CARD, CARD_JSON, MODEL, ExportReport, ModelCard
from proxyrob.models import read_onnx, require_whole_onnx
from proxyrob.source import read_split
from proxyrob.storage import Report
from proxyrob.storage.bounded import parse_json, read_small, require_small
from proxyrob.storage.files import read_frame, read_header, sha256_of, write_bytes, write_json
from proxyrob.types import as_images

CHALLENGER = "challenger"
GATE_TAG, VERDICT_TAG, WAIVED_TAG = "gate", "gate.verdict", "gate.waived."
AGAIN_TAG, WITHDRAWN_TAG = "attacked-again", "champion.withdrawn"
LONGEST_DESCRIPTION = 5000
"""What MLflow's database keeps of a version's description; a longer card lies whole beside the model."""
OTHER_RECORD = "what MLflow keeps was altered: restore it from a back-up, or delete the version and register it again"


class Registration(Report):
    """A registered version, its aliases, and what the gate said of it."""

    name: str
    version: int
    aliases: tuple[str, ...]
    decision: GateDecision


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
        _record_decision(client, found, decision, plan.export.verified(CARD).read_text())
        reason = "; ".join(decision.reasons)
        if decision.verdict == "PASS":
            claim.promote(number, reason)
            if WITHDRAWN_TAG in found.tags:
                client.delete_model_version_tag(name, str(number), WITHDRAWN_TAG)
        elif decision.verdict == "FAIL" and claim.withdraw(number, reason):
            client.set_model_version_tag(name, str(number), WITHDRAWN_TAG, reason)
        return Registration(name=name, version=number, aliases=_aliases(client, name, number), decision=decision)


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
    return withdrawn


class RegisteredVersion(Report):
    """A version of a registered model. ``digest`` is that of the export it was made of."""

    name: str
    number: int
    digest: str
    threat_model: str

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name} version {self.number}"


def describe_version(tracking_uri: str, reference: str) -> RegisteredVersion:
    """The version that ``name``, ``name@alias`` or ``name/version`` means.

    Raises ``ValueError`` when there is none, saying which there are, and when this program did not register it.
    """
    found = _choose_version(MlflowClient(tracking_uri, tracking_uri), reference)
    if DIGEST.fullmatch(found.tags.get(DIGEST_TAG, "")) is None or "threat_model" not in found.tags:
        raise ValueError(f"{reference} was not registered by this program; give its file: model.onnx")
    return RegisteredVersion(
        name=found.name, number=int(found.version), digest=found.tags[DIGEST_TAG], threat_model=found.tags["threat_model"]
    )


def pull_model(tracking_uri: str, reference: str, folder: Path) -> Path:
    """Download a registered model (``name``, ``name@alias`` or ``name/version``): ``model.onnx``, ``card.md``, ``card.json``.

    Without alias or version it is the champion. The card says what the gate said of it. Raises ``ValueError`` when there is no
    such model, saying which there are.
    """
    chosen = _choose_version(MlflowClient(tracking_uri, tracking_uri), reference)
    name = chosen.name
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    with tempfile.TemporaryDirectory() as scratch:
        files = {
            file: Path(download_artifacts(f"models:/{name}/{chosen.version}/{path}", dst_path=scratch))
            for file, path in ((MODEL, MODEL), (CARD, f"extra_files/{CARD}"), (CARD_JSON, f"extra_files/{CARD_JSON}"))
        }
        _require_as_registered(f"{name} version {chosen.version}", files)
        folder.mkdir(parents=True, exist_ok=True)
        for file, path in files.items():
            shutil.copyfile(path, folder / file)
    if (decision := _read_decision(chosen)) is not None:
        add_decision(folder, decision)
    return folder / MODEL


def _require_as_registered(title: str, files: dict[str, Path]) -> None:
    """Raise ``DataIntegrityError`` unless a version's files are what was registered: whoever can write where MLflow keeps files
    may have put others in their place."""
    require_small(f"{CARD} of {title}", files[CARD].stat().st_size)
    card = parse_json(read_small(files[CARD_JSON]), f"{CARD_JSON} of {title}", OTHER_RECORD)
    expected, found = card.get("model_sha256") if isinstance(card, dict) else None, sha256_of(files[MODEL])
    if found != expected:
        raise DataIntegrityError(
            f"{MODEL} of {title} is not the file that its card describes: expected sha256 {expected}, got {found}; "
            f"{OTHER_RECORD}"
        )
    require_whole_onnx(files[MODEL])


def add_decision(folder: Path, decision: GateDecision) -> None:
    """Add what the gate said to the card that lies in ``folder``, for people and for programs."""
    card = folder / CARD
    for_programs = parse_json(read_small(folder / CARD_JSON), str(folder / CARD_JSON), OTHER_RECORD)
    write_bytes(card, f"{card.read_text()}\n{decision.describe()}".encode())
    write_json(folder / CARD_JSON, {**for_programs, "gate": decision.model_dump(mode="json")})


def _choose_version(client: MlflowClient, reference: str) -> ModelVersion:
    name, _, alias = reference.removeprefix("models:/").partition("@")
    name, _, number = name.partition("/")
    try:
        return client.get_model_version(name, number) if number else client.get_model_version_by_alias(name, alias or CHAMPION)
    except MlflowException as error:
        known = ", ".join(model.name for model in client.search_registered_models()) or "none yet"
        wanted = f"version {number}" if number else f"alias {alias or CHAMPION!r}"
        raise ValueError(f"there is no registered model {name!r} with {wanted}; registered models: {known}") from error


def _find_version(client: MlflowClient, name: str, digest: str) -> ModelVersion | None:
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(
            name,
            description=f"Robust classifiers of {name.partition('-')[0]}; "
            "`champion` is the one to use, `challenger` the newest.",
        )
    found = client.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'")
    return client.get_model_version(name, str(found[0].version)) if found else None


def _stored_decision(plan: Plan, version: ModelVersion) -> GateDecision | None:
    """What the gate said of a version, unless its settings or the sanity checks have changed since."""
    decision = _read_decision(version)
    if decision is None:
        return None
    found, gate = decision.comparison, plan.config.gate
    same_margin = found is None or (found.margin, found.confidence) == (gate.margin, gate.confidence)
    failed = tuple(check.name for check in _sanity(plan).having("failed"))
    same_checks = (decision.failed_checks, decision.waivers) == (failed, gate.waivers)
    return decision if same_margin and same_checks else None


def _read_decision(version: ModelVersion) -> GateDecision | None:
    """The decision on a version: ``None`` before there is one, or where another version of this program wrote it."""
    try:
        return GateDecision.model_validate_json(version.tags[GATE_TAG]) if GATE_TAG in version.tags else None
    except ValidationError:
        return None


def _record_decision(client: MlflowClient, version: ModelVersion, decision: GateDecision, card: str) -> None:
    """Write a decision, and every failed check that was waived for it, to the tags and the description of a version."""
    name, number = version.name, str(version.version)
    waived = {f"{WAIVED_TAG}{check}": reason for check, reason in decision.waived.items()}
    for tag in version.tags:
        if tag.startswith(WAIVED_TAG) and tag not in waived:
            client.delete_model_version_tag(name, number, tag)
    tags = {GATE_TAG: decision.model_dump_json(), VERDICT_TAG: decision.verdict, **waived}
    for tag, value in tags.items():
        client.set_model_version_tag(name, number, tag, value)
    description = f"{card}\n{decision.describe()}"
    if len(description) > LONGEST_DESCRIPTION:
        description = decision.describe()[:LONGEST_DESCRIPTION]
    client.update_model_version(name, number, description=description)


def _register(plan: Plan, tracker: Tracker, run_id: str, name: str) -> ModelVersion:
    card = ModelCard.model_validate({key: value for key, value in _card_json(plan).items() if key in ModelCard.model_fields})
    channels, height, width = card.image_shape
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("float32"), (-1, channels, height, width), "images")]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, len(card.class_names)), "logits")]),
    )
    example = as_images(read_split(plan.source, "train").stored[:2]).numpy()
    mlflow.set_tracking_uri(tracker.uri)
    mlflow.set_registry_uri(tracker.uri)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    run = tracker.client.get_run(run_id)
    made = tracker.client.create_logged_model(  # in the run's experiment: MLflow's own default lies in the working directory
        run.info.experiment_id, name="model", source_run_id=run_id, params=run.data.params
    )
    logged = Model.log(
        artifact_path=None,  # pyright: ignore[reportArgumentType]  (a model with a name has no path of its own)
        model_id=made.model_id,
        flavor=onnx_flavor,
        onnx_model=read_onnx(plan.export.verified(MODEL)),
        run_id=run_id,
        signature=signature,
        input_example={"images": example},
        pip_requirements=["onnxruntime", "numpy"],
        onnx_execution_providers=["CPUExecutionProvider"],
        save_as_external_data=False,
        extra_files=[str(plan.export.verified(file)) for file in (CARD, CARD_JSON)],
    )
    measured = {"clean_accuracy": card.clean, "pgd_accuracy": card.pgd, "autoattack_accuracy": card.autoattack}
    tags = {
        DIGEST_TAG: plan.export.digest,
        "threat_model": card.threat,
        **{name: f"{value:.4f}" for name, value in name_figures(measured).items()},
        "test_images": str(card.autoattack.n),
    }
    return tracker.client.create_model_version(
        name,
        logged.model_uri,
        run_id=run_id,
        model_id=logged.model_id,
        tags=tags,
    )


def _card_json(plan: Plan) -> dict[str, object]:
    path = plan.export.verified(CARD_JSON)
    return parse_json(read_small(path), str(path), plan.export.remedy)


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
