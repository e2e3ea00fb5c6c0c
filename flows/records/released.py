"""Registered models as those who use them get them."""

import shutil
import tempfile
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from flows.plan import DIGEST
from flows.records.champions import CHAMPION
from flows.records.patience import is_missing
from flows.records.tracking import DIGEST_TAG
from proxyrob.compare import GateDecision
from proxyrob.errors import DataIntegrityError
from proxyrob.export import CARD, CARD_JSON, MODEL
from proxyrob.models import require_whole_onnx
from proxyrob.storage import Report
from proxyrob.storage.bounded import parse_json, read_small, require_small
from proxyrob.storage.files import sha256_of, write_bytes, write_json

GATE_TAG = "gate"
"""The tag of a version with all that the gate said."""
OTHER_RECORD = "what MLflow keeps was altered: restore it from a back-up, or delete the version and register it again"


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
    if (decision := read_decision(chosen)) is not None:
        add_decision(folder, decision)
    return folder / MODEL


def add_decision(folder: Path, decision: GateDecision) -> None:
    """Add what the gate said to the card that lies in ``folder``, for people and for programs."""
    card = folder / CARD
    for_programs = parse_json(read_small(folder / CARD_JSON), str(folder / CARD_JSON), OTHER_RECORD)
    write_bytes(card, f"{card.read_text()}\n{decision.describe()}".encode())
    write_json(folder / CARD_JSON, {**for_programs, "gate": decision.model_dump(mode="json")})


def read_decision(version: ModelVersion) -> GateDecision | None:
    """The decision on a version: ``None`` before there is one, or where another version of this program wrote it."""
    try:
        return GateDecision.model_validate_json(version.tags[GATE_TAG]) if GATE_TAG in version.tags else None
    except ValidationError:
        return None


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


def _choose_version(client: MlflowClient, reference: str) -> ModelVersion:
    name, _, alias = reference.removeprefix("models:/").partition("@")
    name, _, number = name.partition("/")
    try:
        return client.get_model_version(name, number) if number else client.get_model_version_by_alias(name, alias or CHAMPION)
    except MlflowException as error:
        if not is_missing(error):
            raise
        known = ", ".join(model.name for model in client.search_registered_models()) or "none yet"
        wanted = f"version {number}" if number else f"alias {alias or CHAMPION!r}"
        raise ValueError(f"there is no registered model {name!r} with {wanted}; registered models: {known}") from error
