"""Proof that an exported model equals the torch model, and that it would find one that does not."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from proxyrob.export import prove_parity, write_onnx
from proxyrob.export.parity import TOLERANCE, ParityReport
from proxyrob.models import Classifier, load_classifier
from proxyrob.source import Split, read_split
from proxyrob.storage import Stage
from proxyrob.threat import parse_threat
from tests.toys import random_linear, tiny_split

THREAT = parse_threat("linf:0.15")


@pytest.fixture
def split(digits: Stage) -> Split:
    """The test images."""
    return read_split(digits, "test")


@pytest.fixture
def classifier(toy_classifier: Stage) -> Classifier:
    """A trained model."""
    return load_classifier(toy_classifier)


@pytest.fixture(scope="module")
def path(toy_classifier: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as ONNX."""
    path = tmp_path_factory.mktemp("parity") / "model.onnx"
    write_onnx(load_classifier(toy_classifier), (1, 8, 8), path, {})
    return path


def _prove(model: nn.Module, path: Path, split: Split, seed: int = 0) -> ParityReport:
    return prove_parity(model, path, split, THREAT, torch.Generator().manual_seed(seed))


def test_a_model_equals_its_own_export(classifier: Classifier, path: Path, split: Split) -> None:
    """On clean, attacked and noisy images no class differs, and logits only by rounding."""
    report = _prove(classifier, path, split)
    assert report.passed
    assert [(row.kind, row.num_images, row.different_classes) for row in report.rows] == [
        ("clean", 60, 0),
        ("attacked", 60, 0),
        ("noisy", 60, 0),
    ]
    assert all(row.largest_relative_difference <= TOLERANCE for row in report.rows)


def test_another_model_is_found(classifier: Classifier, path: Path, split: Split) -> None:
    """The export of another network does not pass; the description counts the classes that differ."""
    report = _prove(random_linear(), path, split)
    assert not report.passed
    assert all(row.different_classes > 20 for row in report.rows)
    assert f"clean: {report.rows[0].different_classes} of 60 classes differ" in report.describe()


def test_weights_that_moved_a_little_are_found(classifier: Classifier, path: Path, split: Split) -> None:
    """A change that flips no class is found by the logits: one part in a thousand of the last layer is no rounding."""
    moved = deepcopy(classifier)
    with torch.no_grad():
        next(reversed(list(moved.parameters()))).mul_(1.0).add_(0.05)
    report = _prove(moved, path, split)
    assert sum(row.different_classes for row in report.rows) == 0
    assert not report.passed


def test_a_model_that_differs_on_one_kind_of_images_is_found(classifier: Classifier, path: Path, split: Split) -> None:
    """An export that clips its input equals the model on clean and attacked images, and is betrayed by noise beyond [0,1]."""

    class Clipping(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return classifier(images.clamp(0.0, 1.0))

    report = _prove(Clipping(), path, split)
    differences = {row.kind: row.largest_relative_difference for row in report.rows}
    assert max(differences["clean"], differences["attacked"]) <= TOLERANCE < differences["noisy"]
    assert not report.passed


def test_a_model_that_needs_a_batch_is_found(classifier: Classifier, split: Split, tmp_path: Path) -> None:
    """A batch of one is part of every comparison: an export that normalises by its batch differs on it."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model(images) - self.model(images).mean(0, keepdim=True)

    write_onnx(Centred().eval(), (1, 8, 8), tmp_path / "centred.onnx", {})
    assert not _prove(Centred().eval(), tmp_path / "centred.onnx", split).passed


def test_the_generator_decides_start_and_noise(classifier: Classifier, path: Path, split: Split) -> None:
    """The same stream proves the same numbers."""
    assert _prove(classifier, path, split, seed=3) == _prove(classifier, path, split, seed=3)


def test_one_image_is_enough(path: Path, classifier: Classifier) -> None:
    """A split of a single image is compared as a batch of one."""
    report = _prove(classifier, path, tiny_split(1, shape=(8, 8, 1)))
    assert report.passed
    assert [row.num_images for row in report.rows] == [1, 1, 1]
