"""A model without gradients: what is attacked, what is checked, and what it is called."""

from pathlib import Path

import pytest
import torch

from proxyrob.config import BlackBoxConfig
from proxyrob.evaluate import (
    BLACK_BOX,
    BlackBoxReport,
    check_sanity,
    evaluate_black_box,
    read_verdicts,
    replay_classifier,
)
from proxyrob.models import load_model
from proxyrob.source import ImageSubset, read_split, take_test_images
from proxyrob.storage import Stage
from proxyrob.threat import parse_threat
from tests.conftest import MakeStage
from tests.somebody import adopted, write_onnx_file

THREAT = parse_threat("linf:0.3")


@pytest.fixture
def few(digits: Stage, make_stage: MakeStage) -> Stage:
    """Ten test digits."""
    stage = make_stage("images")
    take_test_images(ImageSubset(count=10), source=digits, stage=stage)
    return stage


@pytest.fixture
def onnx_model(tmp_path: Path, make_stage: MakeStage) -> Stage:
    """An ONNX file that knows the digits."""
    return adopted(make_stage, str(write_onnx_file(tmp_path / "theirs.onnx")))


def test_an_onnx_model_is_attacked_with_square_alone(few: Stage, onnx_model: Stage, make_stage: MakeStage) -> None:
    """What Square breaks is misclassified again from its stored copy, nothing is called AutoAttack, and what needs gradients
    or a training of ours is not run rather than passed."""
    stage = make_stage("evaluate")
    report = evaluate_black_box(BlackBoxConfig(), source=few, model=onnx_model, threat=THREAT, seed=0, stage=stage)
    table, header = read_verdicts(stage)
    split = read_split(few, "test")
    right = load_model(onnx_model)(split.images).argmax(1) == split.targets
    assert report.clean.value == float(right.float().mean())
    assert report.ensemble == BLACK_BOX
    assert "AutoAttack" not in " ".join([report.ensemble, *header.attacks, *header.attacks.values()])
    assert list(header.attacks) == ["square"]
    assert report.black_box.value < report.clean.value
    assert int((table.broken_by == "square").sum()) == report.broken_by["square"]
    replayed = replay_classifier(source=few, evaluation=stage, model=onnx_model)
    assert replayed.fooled.value == 1.0
    assert evaluate_black_box(BlackBoxConfig(), source=few, model=onnx_model, threat=THREAT, seed=0, stage=stage) == report
    assert stage.finished(BlackBoxReport) == report
    sanity = check_sanity(
        source=few, model=onnx_model, evaluation=stage, twin=None, labels=(), seed=0, stage=make_stage("sanity")
    )
    outcomes = {check.name: check.outcome for check in sanity.checks}
    not_run = {name for name, outcome in outcomes.items() if outcome == "not run"}
    assert {"gradients", "saturation", "epsilon-curve", "more-steps", "ensemble", "black-box"} <= not_run
    assert {"transfer", "near-duplicates", "selection"} <= not_run
    assert {name for name, outcome in outcomes.items() if outcome == "passed"} >= {"class-count", "logits", "deterministic"}
    assert sanity.passed


def test_a_batch_of_any_size(onnx_model: Stage) -> None:
    """Logits of an image do not depend on how many are shown at once."""
    images, model = torch.rand(5, 1, 8, 8), load_model(onnx_model)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))
