"""What a command measures: a model of a run, or anybody's."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.console import choose_variant, find_run, plan_of
from flows.plan import derive_stage, stage_folder
from flows.settings import CONFIGURATION, Settings
from proxyrob.config import CertifyConfig, EvaluateConfig
from proxyrob.models import GIVEN, MODEL_FILES, GivenReport, adopt_model, identify_model
from proxyrob.storage import Stage
from proxyrob.storage.bounded import first_fault, read_small
from proxyrob.storage.stage import RECORD, StageRecord
from proxyrob.threat import Threat, parse_threat

REGISTERED = re.compile(r"(?:models:/)?([\w.-]+)(@[\w.-]+|/\d+)")
BLACK_BOX_ONLY = "no gradients are known of an ONNX file: black-box attacks and replay are all that can be done"


@dataclass(frozen=True)
class Subject:
    """A model, and what is known of how it is to be measured.

    ``source``, ``threat`` and ``sigma`` are those it was trained with, where that is known; ``note`` says where it comes from.
    """

    title: str
    note: str
    model: Stage
    has_gradients: bool = True
    source: Stage | None = None
    threat: Threat | None = None
    sigma: float | None = None
    seed: int = 0
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    certify: CertifyConfig = field(default_factory=CertifyConfig)
    twin: Stage | None = None
    labels: tuple[Stage, ...] = ()
    is_foreign: bool = False


def find_subject(
    reference: str, settings: Settings, *, variant: str | None = None, published_as: str | None = None, smoothed: bool = False
) -> Subject:
    """The model that somebody names: a run, a registered version, a training, a file, or ``module:function``.

    ``variant`` is one of a run's models, ``smoothed`` asks for that which was trained for smoothing. Raises ``ValueError``
    saying what was expected.
    """
    path = Path(reference)
    if published_as is None:
        if path.is_dir() and (path / CONFIGURATION).is_file():
            return _of_run(reference, variant, smoothed)
        folder = path.parent if path.name == MODEL_FILES[0] else path
        if (folder / RECORD).is_file():
            _refuse_variant(reference, variant)
            return _of_training(folder)
        if not path.exists() and (named := REGISTERED.fullmatch(reference)) is not None:
            _refuse_variant(reference, variant)
            return _of_registry(f"{named[1]}{named[2]}", settings)
        if not (path.exists() or path.suffix or ":" in reference or "/" in reference):
            return _of_run(reference, variant, smoothed)
    _refuse_variant(reference, variant)
    return _of_anybody(reference, published_as, settings)


def stage_in(folder: Path, kind: str) -> Stage:
    """The finished stage whose record lies in ``folder``.

    Raises ``ValueError`` when there is none, or one of another kind.
    """
    try:
        record = StageRecord.model_validate_json(read_small(folder / RECORD))
    except (OSError, ValidationError) as error:
        reason = first_fault(error) if isinstance(error, ValidationError) else error
        raise ValueError(f"{folder} holds no finished stage: {reason}") from error
    if record.stage != kind:
        raise ValueError(f"{folder} holds a stage {record.stage!r}, expected {kind!r}")
    match record.configuration.get("inputs"):
        case list(inputs) if all(isinstance(given, list) and [str, str] == [type(part) for part in given] for given in inputs):
            pass
        case _:
            raise ValueError(f"{folder / RECORD} does not say what the stage was made of; it was altered")
    return Stage(record.stage, record.digest, folder.absolute(), record.configuration)


def input_of(stage: Stage, kind: str) -> Stage | None:
    """The first input of a stage that is of this kind, where it lies whole in the same store."""
    store = stage.folder.parent.parent
    for name, digest in stage.configuration["inputs"]:
        if name == kind and ((folder := stage_folder(store, kind, digest)) / RECORD).is_file():
            found = stage_in(folder, kind)
            return found if found.digest == digest and found.is_whole() else None
    return None


def _of_run(reference: str, model: str | None, smoothed: bool) -> Subject:
    try:
        plan = plan_of(find_run(reference))
    except ValueError as error:
        if Path(reference).is_dir():
            raise
        raise ValueError(f"{error}. Or give a model: NAME@champion, a file, module:function (see --help)") from error
    variant = choose_variant(plan, model)
    stages = plan.variants[variant]
    return Subject(
        title=f"{plan.run_name} · {variant}",
        note=f"The model {variant} of the run {plan.run_name}.",
        model=stages.smooth if smoothed else stages.train,
        source=plan.source,
        threat=plan.config.threat,
        sigma=plan.config.smooth.objective.sigma,
        seed=plan.config.seed,
        evaluate=plan.config.evaluate,
        certify=plan.config.certify,
        twin=plan.twin(variant),
        labels=plan.labels(variant),
    )


def _of_training(folder: Path) -> Subject:
    stage = stage_in(folder, "train")
    about = stage.configuration
    smoothing: dict[str, Any] | None = about.get("SmoothTrainConfig")
    try:
        return Subject(
            title=f"training {stage.digest[:8]}",
            note=f"The classifier that the training {stage.digest[:8]} ended with.",
            model=stage,
            source=input_of(stage, "source"),
            threat=parse_threat(about["threat"]) if "threat" in about else None,
            sigma=None if smoothing is None else smoothing["values"]["objective"]["values"]["sigma"],
            seed=about["seed"],
        )
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{folder / RECORD} does not say how the model was trained ({error!r}); it was altered") from error


def _of_registry(name: str, settings: Settings) -> Subject:
    from flows.records.released import describe_version, pull_model
    from flows.records.tracking import Tracker

    uri = Tracker(settings).uri
    version = describe_version(uri, name)
    exported = stage_folder(settings.store, "export", version.digest)
    if (exported / RECORD).is_file():
        stage = stage_in(exported, "export")
        trained = input_of(stage, "train") if stage.digest == version.digest else None
        if trained is not None:
            return Subject(
                title=version.title,
                note=f"{version.title}: its weights are on this machine, and measured is the torch model that the registered "
                "ONNX file was proven to equal.",
                model=trained,
                source=input_of(stage, "source"),
                threat=parse_threat(version.threat_model),
                seed=stage.configuration["seed"],
            )
    file = pull_model(uri, f"{version.name}/{version.number}", stage_folder(settings.store, "pulled", version.digest))
    found = _of_anybody(str(file), None, settings)
    return Subject(
        title=version.title,
        note=f"{version.title}, as registered; {BLACK_BOX_ONLY}.",
        model=found.model,
        has_gradients=False,
        threat=parse_threat(version.threat_model),
        is_foreign=True,
    )


def _of_anybody(reference: str, published_as: str | None, settings: Settings) -> Subject:
    identity = identify_model(reference, published_as)
    stage = derive_stage(settings.store, 0, GIVEN, (), model=identity.about())
    adopted: GivenReport = adopt_model(identity, stage=stage)
    name = reference if identity.kind == "function" else Path(reference).name
    origin = {
        "function": f"The model that {reference}() returns",
        "published": f"The weights in {name}, of the architecture of {published_as}",
        "ours": f"The network of ours in {name}",
        "onnx": f"The ONNX file {name}; {BLACK_BOX_ONLY}",
    }[identity.kind]
    return Subject(
        title=name if published_as is None else f"{name} as {published_as}",
        note=f"{origin}. How it was trained is not known here.",
        model=stage,
        has_gradients=adopted.has_gradients,
        is_foreign=True,
    )


def _refuse_variant(reference: str, variant: str | None) -> None:
    if variant is not None:
        raise ValueError(f"--model {variant} chooses a model of a run, and {reference} is none; leave it out")
