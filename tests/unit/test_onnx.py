"""Export to ONNX: one file that holds the network, its normalisation and what was measured."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from proxyrob.errors import DataIntegrityError, ParityError
from proxyrob.evaluate import EvaluationReport, read_verdicts
from proxyrob.export import ExportReport, export_classifier, read_card, write_onnx
from proxyrob.export.onnx import read_onnx_metadata
from proxyrob.models import load_classifier
from proxyrob.source import read_split, source_report
from proxyrob.storage import Stage
from proxyrob.storage.files import sha256_of
from tests.conftest import MakeStage
from tests.toys import Recorder, damage, files_below, random_images


@pytest.fixture(scope="module")
def exported(digits: Stage, toy_classifier: Stage, evaluation: Stage, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """The toy classifier, exported."""
    stage = Stage("export", "4" * 64, tmp_path_factory.mktemp("export"), {})
    _export(digits, toy_classifier, evaluation, stage)
    return stage


def _export(digits: Stage, model: Stage, evaluation: Stage, stage: Stage, **values: Any) -> ExportReport:
    return export_classifier(
        "digits-linf",
        training="natural training, 80 steps",
        training_data="60 real images of digits",
        source=digits,
        model=model,
        evaluation=evaluation,
        seed=0,
        stage=stage,
        **values,
    )


def _run(path: Path, images: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    return np.asarray(logits)


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_the_file_gives_the_models_logits_for_any_batch(
    exported: Stage, toy_classifier: Stage, digits: Stage, count: int
) -> None:
    """The batch is dynamic, and images in [0,1] go in as they are: normalisation is inside."""
    images = read_split(digits, "test").images[:count]
    with torch.inference_mode():
        expected = load_classifier(toy_classifier)(images).numpy()
    found = _run(exported.folder / "model.onnx", images)
    assert found.shape == (count, 10)
    assert np.allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_input_and_output_are_named_and_typed(exported: Stage) -> None:
    """``images`` float32 [batch, 1, 8, 8] in, ``logits`` [batch, 10] out, with a name for the dynamic batch."""
    session = onnxruntime.InferenceSession(exported.folder / "model.onnx", providers=["CPUExecutionProvider"])
    (given,), (found,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(float)", ["batch", 1, 8, 8])
    assert (found.name, found.type, found.shape) == ("logits", "tensor(float)", ["batch", 10])


def test_the_file_is_one_and_holds_no_python(exported: Stage) -> None:
    """No weights in a second file, and only operators of the ONNX standard."""
    assert files_below(exported.folder) == {"model.onnx", "card.md", "card.json", "stage.json"}
    model = onnx.load(exported.folder / "model.onnx", load_external_data=False)
    assert {opset.domain for opset in model.opset_import} <= {"", "ai.onnx"}
    assert not model.functions
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_batch_normalisation_is_exported_as_it_is_measured(other_classifier: Stage, tmp_path: Path) -> None:
    """A network with running statistics gives an image the same logits alone and in a batch."""
    classifier = load_classifier(other_classifier)
    write_onnx(classifier, (1, 8, 8), tmp_path / "model.onnx", {"a": "b"})
    images = random_images(5)
    with torch.inference_mode():
        expected = classifier(images).numpy()
    assert np.allclose(_run(tmp_path / "model.onnx", images), expected, atol=1e-4)
    assert np.allclose(_run(tmp_path / "model.onnx", images[:1]), expected[:1], atol=1e-4)
    assert read_onnx_metadata(tmp_path / "model.onnx") == {"a": "b"}


def test_exporting_configures_no_logging(linear_model: nn.Module, tmp_path: Path) -> None:
    """Whoever uses the library decides what torch's exporter logs; the level is given back."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        write_onnx(linear_model.eval(), (1, 8, 8), tmp_path / "model.onnx", {})
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(before)


def test_exporting_draws_no_global_randomness(linear_model: nn.Module, tmp_path: Path) -> None:
    """The library uses named streams alone; torch's global generator stays where it was."""
    before = torch.get_rng_state().tolist()
    write_onnx(linear_model.eval(), (1, 8, 8), tmp_path / "model.onnx", {})
    assert torch.get_rng_state().tolist() == before


def test_the_metadata_says_what_was_measured(exported: Stage, evaluation: Stage, digits: Stage, toy_classifier: Stage) -> None:
    """Labels, threat model, accuracies and digests; every figure is that of the verdict table."""
    metadata = read_onnx_metadata(exported.folder / "model.onnx")
    measured = evaluation.finished(EvaluationReport)
    assert measured is not None
    assert json.loads(metadata["labels"]) == list("0123456789")
    assert metadata["threat_model"] == "linf:1/5"
    assert float(metadata["clean_accuracy"]) == measured.clean.value
    assert float(metadata["pgd_accuracy"]) == measured.pgd.value
    assert float(metadata["autoattack_accuracy"]) == measured.autoattack.value
    assert json.loads(metadata["digests"]) == {
        "source": digits.digest,
        "model": toy_classifier.digest,
        "evaluation": evaluation.digest,
        "data": source_report(digits).content_sha256,
    }


def test_the_card_inside_the_file_is_complete(exported: Stage, evaluation: Stage) -> None:
    """Whoever has only the file knows architecture, data, threat, figures with intervals, and how weights were chosen."""
    card = read_card(exported.folder / "model.onnx")
    measured, (table, header) = evaluation.finished(EvaluationReport), read_verdicts(evaluation)
    assert measured is not None
    assert (card.name, card.training, card.training_data) == (
        "digits-linf",
        "natural training, 80 steps",
        "60 real images of digits",
    )
    assert card.architecture.startswith("cnn with ")
    assert (card.clean, card.pgd, card.autoattack, card.pgd_steps) == (measured.clean, measured.pgd, measured.autoattack, 5)
    assert (card.threat, card.test_data) == (f"linf:{header.epsilon}", f"the test split, {len(table)} images")
    assert (card.image_shape, card.class_names, card.selection) == ((1, 8, 8), tuple("0123456789"), "last step")
    assert card.autoattack_version == header.attacks["apgd-ce"]


def test_the_report_is_that_of_the_file(exported: Stage) -> None:
    """Hash and size of the file, and a proof over all three kinds of images."""
    report, path = exported.finished(ExportReport), exported.folder / "model.onnx"
    assert report is not None
    assert (report.sha256, report.size_bytes) == (sha256_of(path), path.stat().st_size)
    assert report.parity.passed
    assert [(row.kind, row.num_images, row.different_classes) for row in report.parity.rows] == [
        ("clean", 60, 0),
        ("attacked", 60, 0),
        ("noisy", 60, 0),
    ]


def test_the_written_card_is_that_of_the_file(exported: Stage) -> None:
    """``card.json`` is the card, the proof and the hash; ``card.md`` says the same to people."""
    card, report = read_card(exported.folder / "model.onnx"), exported.finished(ExportReport)
    assert report is not None
    content = json.loads((exported.folder / "card.json").read_text())
    assert content == {
        **card.model_dump(mode="json"),
        "parity": report.parity.model_dump(mode="json"),
        "model_sha256": report.sha256,
    }
    text = (exported.folder / "card.md").read_text()
    for part in ("# digits-linf", "**linf:1/5**", report.sha256, f"{100 * card.autoattack.value:.1f} %", "PGD-5", "Seed: 0"):
        assert part in text


def test_the_snippet_on_the_card_runs(
    exported: Stage, toy_classifier: Stage, digits: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the card tells people to type gives the model's classes."""
    snippet = (exported.folder / "card.md").read_text().split("```python\n")[1].split("```")[0]
    images = read_split(digits, "test").images
    monkeypatch.chdir(exported.folder)
    names: dict[str, Any] = {"images": images.double().numpy()}
    exec(snippet, names)  # noqa: S102  # our own card
    assert names["classes"].tolist() == load_classifier(toy_classifier)(images).argmax(1).tolist()


def test_a_finished_export_is_not_made_again(exported: Stage, digits: Stage, toy_classifier: Stage, evaluation: Stage) -> None:
    """A second call gives the report and writes nothing."""
    recorder = Recorder()
    report = _export(digits, toy_classifier, evaluation, exported, on_progress=recorder)
    assert (report, recorder.told) == (exported.finished(ExportReport), [])


def test_figures_of_an_unfinished_evaluation_are_not_exported(
    digits: Stage, toy_classifier: Stage, make_stage: MakeStage
) -> None:
    """A card is never written without measurements."""
    stage = make_stage("export")
    with pytest.raises(DataIntegrityError, match="is not finished; run the evaluation first"):
        _export(digits, toy_classifier, make_stage("evaluate"), stage)
    assert stage.record() is None


def test_a_damaged_verdict_table_is_not_exported(
    digits: Stage, toy_classifier: Stage, evaluation: Stage, make_stage: MakeStage, tmp_path: Path
) -> None:
    """Figures on a card are read from a table whose hash was checked."""
    shutil.copytree(evaluation.folder, tmp_path / "copy")
    copy = Stage(evaluation.name, evaluation.digest, tmp_path / "copy", {})
    damage(copy.folder / "verdicts.parquet")
    with pytest.raises(DataIntegrityError, match=r"verdicts\.parquet is damaged"):
        _export(digits, toy_classifier, copy, make_stage("export"))


def test_a_file_that_differs_is_not_released(
    digits: Stage, toy_classifier: Stage, evaluation: Stage, make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the written file gives other logits, the export ends in an error and stays unfinished."""
    stage = make_stage("export")

    def write_another(model: nn.Module, image_shape: tuple[int, int, int], path: Path, metadata: dict[str, str]) -> None:
        with torch.no_grad():
            next(reversed(list(model.parameters()))).add_(torch.linspace(0, 3, 10))
        write_onnx(model, image_shape, path, metadata)
        with torch.no_grad():
            next(reversed(list(model.parameters()))).sub_(torch.linspace(0, 3, 10))

    monkeypatch.setattr("proxyrob.export.onnx.write_onnx", write_another)
    with pytest.raises(ParityError, match=r"does not equal the trained model: clean: \d+ of 60 classes differ.*not released"):
        _export(digits, toy_classifier, evaluation, stage)
    assert stage.record() is None


def test_a_foreign_file_has_no_card(linear_model: nn.Module, tmp_path: Path) -> None:
    """An ONNX file that another program wrote is refused."""
    write_onnx(linear_model.eval(), (1, 8, 8), tmp_path / "foreign.onnx", {"producer": "somebody"})
    with pytest.raises(ValueError, match=r"foreign\.onnx carries no proxyrob card; it was not exported by this program"):
        read_card(tmp_path / "foreign.onnx")
