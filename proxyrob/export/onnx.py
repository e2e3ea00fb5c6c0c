"""A trained classifier as ONNX: normalisation inside, batch dynamic, and what was measured in its metadata."""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from pydantic import ValidationError
from torch import nn

from proxyrob.errors import DataIntegrityError, ParityError
from proxyrob.evaluate import STANDARD_ATTACKS, EvaluationReport, read_verdicts
from proxyrob.export.card import ModelCard, write_card
from proxyrob.export.parity import ParityReport, prove_parity
from proxyrob.models import ClassifierCard, load_classifier, read_onnx
from proxyrob.rng import Streams
from proxyrob.source import read_split, source_report
from proxyrob.storage import Report, Stage
from proxyrob.storage.bounded import first_fault
from proxyrob.storage.files import sha256_of, write_bytes
from proxyrob.threat import parse_threat
from proxyrob.train import TrainReport
from proxyrob.types import OnProgress, no_progress

MODEL = "model.onnx"
CARD = "card.md"
CARD_JSON = "card.json"
OPSET = 20


class ExportReport(Report):
    """An exported model, proven equal to the trained one."""

    sha256: str
    size_bytes: int
    parity: ParityReport


def export_classifier(
    name: str,
    *,
    training: str,
    training_data: str,
    source: Stage,
    model: Stage,
    evaluation: Stage,
    seed: int,
    stage: Stage,
    on_progress: OnProgress = no_progress,
) -> ExportReport:
    """Write ``model.onnx``, prove that it equals the torch model, and write its card (``card.md``, ``card.json``).

    ``training`` and ``training_data`` are what the card says of how the model was made; every figure on it is read from
    the evaluation's verdict table. The file is exported from the CPU.

    Randomness: ``export/parity``. Raises ``ParityError`` when a class differs on clean, attacked or noisy images,
    or the logits do by more than rounding.
    """
    if (report := stage.finished(ExportReport)) is not None:
        return report
    started = time.monotonic()
    classifier = load_classifier(model)
    card = _make_card(name, training, training_data, classifier.card, source, model, evaluation, seed)
    path = stage.folder / MODEL
    write_onnx(classifier, classifier.card.image_shape, path, card.onnx_metadata())
    on_progress(1, 2)
    parity = prove_parity(
        classifier,
        path,
        read_split(source, "test"),
        parse_threat(card.threat),
        Streams(seed).torch("export/parity"),
    )
    if not parity.passed:
        raise ParityError(f"{path} does not equal the trained model: {parity.describe()}; it was not released")
    sha256 = sha256_of(path)
    write_card(stage.folder, card, parity, sha256)
    on_progress(2, 2)
    report = ExportReport(sha256=sha256, size_bytes=path.stat().st_size, parity=parity)
    return stage.finish(report, [MODEL, CARD, CARD_JSON], started)


def write_onnx(model: nn.Module, image_shape: tuple[int, int, int], path: Path, metadata: dict[str, str]) -> None:
    """Export ``model`` (eval mode) with input ``images`` float32 ``[batch, c, h, w]`` in [0,1] and output ``logits``.

    The file is self-contained and holds no Python; ``metadata`` becomes its metadata properties.
    """
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")  # the exporter warns about its own internals, nothing a caller can act on
        program = torch.onnx.export(
            model,
            (torch.zeros(2, *image_shape),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto, full_check=True)
    write_bytes(path, proto.SerializeToString())


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Errors alone from a logger whose progress nobody asked for; its level is given back."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _make_card(
    name: str,
    training: str,
    training_data: str,
    network: ClassifierCard,
    source: Stage,
    model: Stage,
    evaluation: Stage,
    seed: int,
) -> ModelCard:
    measured, trained = evaluation.finished(EvaluationReport), model.finished(TrainReport)
    if measured is None or trained is None:
        raise DataIntegrityError(f"{evaluation.folder} or {model.folder} is not finished; run the evaluation first")
    table, header = read_verdicts(evaluation)
    real = source_report(source)
    (pgd_name,) = [attack for attack in header.attacks if attack.startswith("pgd-")]
    return ModelCard(
        name=name,
        architecture=f"{network.model.kind} with {trained.num_parameters:,} parameters",
        class_names=real.class_names,
        image_shape=real.image_shape,
        threat=f"{header.norm}:{header.epsilon}",
        training=training,
        training_data=training_data,
        test_data=f"the {header.split} split, {len(table)} images",
        clean=measured.clean,
        pgd=measured.pgd,
        pgd_steps=int(pgd_name.removeprefix("pgd-")),
        autoattack=measured.autoattack,
        autoattack_name=measured.ensemble,
        autoattack_version=header.attacks[STANDARD_ATTACKS[0]],
        selection=trained.selection,
        seed=seed,
        digests={"source": source.digest, "model": model.digest, "evaluation": evaluation.digest, "data": real.content_sha256},
    )


def read_onnx_metadata(path: Path) -> dict[str, str]:
    """The metadata properties of an exported model; the values are JSON or plain text."""
    return {entry.key: entry.value for entry in read_onnx(path).metadata_props}


def read_card(path: Path) -> ModelCard:
    """The card inside an exported model's metadata.

    Raises ``ValueError`` when the file was not exported by this program.
    """
    metadata = read_onnx_metadata(path)
    if "proxyrob.card" not in metadata:
        raise ValueError(f"{path} carries no proxyrob card; it was not exported by this program")
    try:
        return ModelCard.model_validate_json(metadata["proxyrob.card"])
    except ValidationError as error:
        raise DataIntegrityError(
            f"{path} carries a card that cannot be read ({first_fault(error)}); export it again"
        ) from error
