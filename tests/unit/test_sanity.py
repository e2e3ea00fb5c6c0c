"""Checks against gradient masking, each on a model that is made to fail it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.evaluate import STANDARD_ATTACKS, SanityReport, VerdictHeader, check_sanity, inspect_model, tabulate_verdicts
from proxyrob.evaluate.sanity import _check_inputs
from proxyrob.evaluate.verdicts import VERDICTS, summarise
from proxyrob.models import load_classifier
from proxyrob.source import Split, read_split, source_report
from proxyrob.storage import Stage
from proxyrob.storage.files import write_table
from tests.conftest import MakeStage
from tests.toys import Recorder

TWICE, ALONE, ORDER = (
    "logits are the same twice",
    "logits are the same alone and in a batch",
    "logits are the same in another order",
)
LOGITS, GRADIENTS, CURVE = "outputs are logits", "gradients reach the image", "accuracy falls to chance as epsilon grows"


class _Noisy(nn.Module):
    """A randomised defence: noise on every input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images + 0.05 * torch.randn_like(images))


class _BatchDependent(nn.Module):
    """A model that normalises by its batch, as batch normalisation in train mode does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) - self.model(images).mean(0)


class _OrderDependent(nn.Module):
    """A model whose answer depends on the place in the batch, as a leaking shape would make it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) * (1.0 + 0.1 * torch.arange(len(images))[:, None])


class _Quantising(nn.Module):
    """A defence by rounding pixels: its gradient is 0 everywhere, though it is as easily fooled as before."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images * 16).round() / 16)


class _Saturated(nn.Module):
    """A defence by scaling: the logits are so far apart that the loss is 0 in float32, and so is its gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) * 1e6


class _Immune(nn.Module):
    """A model that knows the answers by their place: no epsilon makes it err."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.originals, self.answers = split.images, 10.0 * F.one_hot(split.targets, 10).float()

    def forward(self, images: Tensor) -> Tensor:
        return self.answers[: len(images)] + 0.0 * images.sum()


class _Fickle(_Immune):
    """A model that errs after a small or a very large perturbation, and not after one in between."""

    def forward(self, images: Tensor) -> Tensor:
        distance = (images - self.originals[: len(images)]).flatten(1).abs().amax(1)
        errs = ((distance > 0.05) & (distance < 0.18)) | (distance > 0.6)
        return super().forward(images) * torch.where(errs, -1.0, 1.0)[:, None]


@pytest.fixture
def honest(toy_classifier: Stage) -> nn.Module:
    """A classifier that passes every check."""
    return load_classifier(toy_classifier)


@pytest.fixture
def test_split(digits: Stage) -> Split:
    """The images that checks are made on."""
    return read_split(digits, "test")


def _failed(model: nn.Module, split: Split, **values: Any) -> set[str]:
    given: dict[str, Any] = {"norm": "linf", "generator": torch.Generator().manual_seed(0), **values}
    checks = inspect_model(model, split.images, split.targets, **given)
    assert [check.name for check in checks] == [TWICE, ALONE, ORDER, LOGITS, GRADIENTS, CURVE]
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_honest_model_passes_every_check(honest: nn.Module, test_split: Split, norm: str) -> None:
    """A plain classifier is not suspected, under either norm; progress is told to the end."""
    recorder = Recorder()
    assert _failed(honest, test_split, norm=norm, on_progress=recorder) == set()
    assert recorder.told[-1][0] == recorder.told[-1][1]


def test_a_stochastic_model_is_found(honest: nn.Module, test_split: Split) -> None:
    """Two answers to the same image differ."""
    assert TWICE in _failed(_Noisy(honest), test_split)


def test_a_batch_dependent_model_is_found(honest: nn.Module, test_split: Split) -> None:
    """An image gets other logits alone than among others, though the same twice and in any order."""
    failed = _failed(_BatchDependent(honest), test_split)
    assert ALONE in failed
    assert not failed & {TWICE, ORDER}


def test_an_order_dependent_model_is_found(honest: nn.Module, test_split: Split) -> None:
    """An image gets other logits at another place in the batch."""
    failed = _failed(_OrderDependent(honest), test_split)
    assert ORDER in failed
    assert TWICE not in failed


def test_a_model_that_outputs_probabilities_is_found(honest: nn.Module, test_split: Split) -> None:
    """Attacks need logits; rows that sum to 1 and are not negative are probabilities."""
    assert LOGITS in _failed(nn.Sequential(honest, nn.Softmax(dim=1)), test_split)


@pytest.mark.parametrize("masking", [_Quantising, _Saturated])
def test_a_model_with_masked_gradients_is_found(honest: nn.Module, test_split: Split, masking: type[Any]) -> None:
    """No gradient reaches the image; the finding counts the images."""
    model = masking(honest)
    assert GRADIENTS in _failed(model, test_split)
    checks = inspect_model(model, test_split.images, test_split.targets, norm="linf", generator=torch.Generator())
    (finding,) = [check.finding for check in checks if check.name == GRADIENTS]
    assert finding.endswith("of 60 images have an all-zero gradient of the loss")
    assert int(finding.split()[0]) > 30


@pytest.mark.parametrize("suspicious", [_Immune, _Fickle])
def test_a_curve_that_does_not_fall_to_chance_is_found(test_split: Split, suspicious: type[_Immune]) -> None:
    """Accuracy has to end at chance where epsilon can erase the image, and must not rise on the way there."""
    assert CURVE in _failed(suspicious(test_split), test_split)


@pytest.mark.parametrize(
    ("value", "passed"),
    [(0.0, True), (1.0, True), (100 / 255, True), (100.4 / 255, False), (-1 / 255, False), (256 / 255, False)],
)
def test_inputs_off_the_grid_or_outside_the_box_are_found(test_split: Split, value: float, passed: bool) -> None:
    """One pixel between two levels, below black or above white: these are not the images of the data set."""
    images = test_split.images
    images[3, 0, 4, 4] = value
    assert _check_inputs(images).passed == passed


# The stage, over a verdict table


def _evaluation(stage: Stage, model: Stage, source: Stage, hits: dict[str, np.ndarray], pgd: np.ndarray) -> Stage:
    """A finished evaluation whose verdicts are given."""
    split = read_split(source, "test")
    table = tabulate_verdicts(split.labels, split.labels, hits, {"pgd-5": pgd})
    header = VerdictHeader(
        norm="linf",
        epsilon="1/10",
        attacks=dict.fromkeys((*STANDARD_ATTACKS, "pgd-5"), "given"),
        seed=0,
        split="test",
        model=model.digest,
        data_sha256=source_report(source).content_sha256,
    )
    write_table(stage.folder / VERDICTS, table, header.model_dump(mode="json"))
    stage.finish(summarise(table, "pgd-5"), [VERDICTS], 0.0)
    return stage


def _hits(**counts: int) -> dict[str, np.ndarray]:
    """The first rows of 60 are broken by the first attack, the next ones by the next."""
    hits, start = {}, 0
    for name in STANDARD_ATTACKS:
        hits[name] = np.zeros(60, bool)
        hits[name][start : start + counts.get(name.replace("-", "_"), 0)] = True
        start += counts.get(name.replace("-", "_"), 0)
    return hits


def _check(source: Stage, model: Stage, evaluation: Stage, stage: Stage) -> SanityReport:
    return check_sanity(source=source, model=model, evaluation=evaluation, norm="linf", seed=0, stage=stage)


@pytest.mark.parametrize(
    ("counts", "pgd", "failed"),
    [
        ({"apgd_ce": 20}, 15, set()),
        ({"apgd_ce": 20}, 20, set()),
        ({"apgd_ce": 20}, 21, {"AutoAttack is not weaker than PGD"}),
        ({"apgd_ce": 20, "square": 2}, 10, set()),
        ({"apgd_ce": 20, "square": 3}, 10, {"black box adds little to white box"}),
    ],
)
def test_suspicious_verdicts_are_found(
    counts: dict[str, int],
    pgd: int,
    failed: set[str],
    digits: Stage,
    toy_classifier: Stage,
    make_stage: MakeStage,
) -> None:
    """PGD that beats AutoAttack, or a black-box attack that breaks what white-box ones could not, blocks promotion."""
    evaluation = _evaluation(make_stage("evaluate"), toy_classifier, digits, _hits(**counts), np.arange(60) < pgd)
    report = _check(digits, toy_classifier, evaluation, make_stage("sanity"))
    assert {check.name for check in report.checks if not check.passed} == failed
    assert report.passed == (not failed)


def test_all_checks_are_made_and_kept(digits: Stage, other_classifier: Stage, make_stage: MakeStage) -> None:
    """A network with batch normalisation passes; the ten checks are stored, and a second call reads them."""
    evaluation = _evaluation(make_stage("evaluate"), other_classifier, digits, _hits(apgd_ce=20), np.arange(60) < 10)
    stage = make_stage("sanity")
    report = _check(digits, other_classifier, evaluation, stage)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert len({check.name for check in report.checks}) == 10
    assert "running statistics stay" in {check.name for check in report.checks}
    assert _check(digits, other_classifier, evaluation, stage) == report == stage.finished(SanityReport)


def test_findings_are_in_words(digits: Stage, toy_classifier: Stage, make_stage: MakeStage) -> None:
    """Every check says what was found, with its numbers."""
    evaluation = _evaluation(make_stage("evaluate"), toy_classifier, digits, _hits(apgd_ce=20), np.arange(60) < 10)
    findings = {check.name: check.finding for check in _check(digits, toy_classifier, evaluation, make_stage("sanity")).checks}
    assert findings["AutoAttack is not weaker than PGD"] == "40 of 60 images withstand AutoAttack, 50 withstand pgd-5"
    assert findings["black box adds little to white box"] == "Square alone broke 0 of 60 images"
    assert findings["inputs lie in [0,1] on the 8-bit grid"].startswith("range [0.000, 1.000]")
