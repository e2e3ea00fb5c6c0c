"""Adversarial images of one classifier, shown to another."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from proxyrob.errors import DataIntegrityError
from proxyrob.evaluate import (
    ADVERSARIAL,
    AdversarialHeader,
    AdversarialImages,
    EvaluationReport,
    replay_adversarial,
    replay_classifier,
)
from proxyrob.evaluate.adversarial import write_adversarial
from proxyrob.export.onnx import write_onnx
from proxyrob.models import load_classifier
from proxyrob.source import read_split
from proxyrob.storage import Stage
from tests.conftest import MakeStage
from tests.toys import Scripted, random_images, tiny_split, write_source

IMAGES = random_images(6, shape=(1, 4, 4))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def _stored(folder: Path, *, epsilon: str = "1/10", labels: tuple[int, ...] = (1, 0, 2)) -> Path:
    """Adversarial images of the images 1, 3 (by one attack) and 5 (by another)."""
    header = AdversarialHeader(
        norm="linf", epsilon=epsilon, split="test", image_shape=(1, 4, 4), model="abc", data_sha256="def"
    )
    moved = (IMAGES + 0.05).clamp(0, 1)
    parts = [
        AdversarialImages("apgd-ce", np.array([1, 3]), np.array(labels[:2]), moved[[1, 3]]),
        AdversarialImages("square", np.array([5]), np.array(labels[2:]), moved[[5]]),
    ]
    write_adversarial(folder / ADVERSARIAL, parts, header)
    return folder / ADVERSARIAL


def test_clean_errors_and_fooling_images_are_counted(tmp_path: Path) -> None:
    """Six images, one misclassified unperturbed, two of three stored perturbations fool: robust accuracy is at most 3/6."""
    clean, replayed = [0, 1, 1, 0, 1, 2], [0, 0, 0]  # image 2 is wrong by itself; 1 and 5 are fooled, 3 is not
    report = replay_adversarial(_stored(tmp_path), Scripted([*clean, *replayed], 3), IMAGES, LABELS, batch_size=4)
    assert (report.clean.value, report.clean.n) == (5 / 6, 6)
    assert (report.fooled.value, report.fooled.n) == (2 / 3, 3)
    assert report.fooled_by == {"apgd-ce": 1, "square": 1}
    assert (report.upper_bound.value, report.upper_bound.n) == (3 / 6, 6)


def test_a_model_is_fooled_by_all_of_its_own(evaluation: Stage, digits: Stage, toy_classifier: Stage) -> None:
    """Loaded anew, the model that was attacked errs on every stored image, and the bound is its AutoAttack accuracy (or the
    share that withstood PGD as well)."""
    report = replay_classifier(source=digits, evaluation=evaluation, model=toy_classifier)
    found = evaluation.finished(EvaluationReport)
    assert found is not None
    assert report.fooled.value == 1.0
    assert report.fooled_by == {name: count for name, count in found.broken_by.items() if name != "clean"}
    assert report.clean == found.clean
    assert report.upper_bound.value == pytest.approx(1 - sum(found.broken_by.values()) / 60)


def test_another_model_and_an_exported_one_can_be_asked(
    evaluation: Stage, digits: Stage, toy_classifier: Stage, other_classifier: Stage, tmp_path: Path
) -> None:
    """A session of onnxruntime gives what the model gives; another network is fooled less than that which was attacked."""
    other = replay_classifier(source=digits, evaluation=evaluation, model=other_classifier)
    assert 0.0 < other.fooled.value < 1.0
    classifier, split = load_classifier(toy_classifier), read_split(digits, "test")
    write_onnx(classifier, classifier.card.image_shape, tmp_path / "model.onnx", {})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")

    def classify(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    own = replay_classifier(source=digits, evaluation=evaluation, model=toy_classifier)
    assert replay_adversarial(evaluation.folder / ADVERSARIAL, classify, split.images, split.targets) == own


@pytest.mark.parametrize(
    ("values", "images", "error", "message"),
    [
        ({"labels": (1, 0, 0)}, IMAGES, ValueError, "holds adversarial images of another data set than these 6 images"),
        ({}, IMAGES[:5], ValueError, "holds adversarial images of another data set than these 5 images"),
        ({"epsilon": "1/100"}, IMAGES, DataIntegrityError, "apgd-ce left the threat model linf:1/100"),
        ({}, 1 - IMAGES, DataIntegrityError, "apgd-ce left the threat model linf:1/10"),
    ],
)
def test_images_that_do_not_belong_together_are_refused(
    values: dict[str, Any], images: Tensor, error: type[Exception], message: str, tmp_path: Path
) -> None:
    """Labels, numbers and distances are checked before anything is concluded."""
    with pytest.raises(error, match=message):
        replay_adversarial(_stored(tmp_path, **values), Scripted([0] * 9, 3), images, LABELS[: len(images)])


def test_another_data_set_is_refused(evaluation: Stage, toy_classifier: Stage, make_stage: MakeStage) -> None:
    """Images are known by their content."""
    source = make_stage("source")
    write_source(source, tiny_split(60, shape=(8, 8, 1)))
    with pytest.raises(ValueError, match="the evaluation is of other images"):
        replay_classifier(source=source, evaluation=evaluation, model=toy_classifier)


def test_nothing_to_show_is_said(tmp_path: Path) -> None:
    """A model that nothing broke left no images."""
    header = AdversarialHeader(norm="l2", epsilon="1", split="test", image_shape=(1, 4, 4), model="a", data_sha256="d")
    write_adversarial(tmp_path / ADVERSARIAL, [], header)
    with pytest.raises(ValueError, match="holds no adversarial image"):
        replay_adversarial(tmp_path / ADVERSARIAL, Scripted([0] * 6, 3), IMAGES, LABELS)
