"""Checks of a network, each on one that is made to fail it, and on honest ones."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks import margins
from proxyrob.evaluate import SanityCheck, inspect_model
from proxyrob.evaluate.masking import FARTHER, RESTARTS, attack_again, attack_through_twin
from proxyrob.models import load_classifier
from proxyrob.source import Split, read_split
from proxyrob.storage import Stage
from proxyrob.threat import parse_threat
from tests.toys import Linear, Recorder

NAMES = [
    "class-count",
    "logits",
    "deterministic",
    "batch-of-one",
    "batch-order",
    "batch-padding",
    "running-statistics",
    "gradients",
    "saturation",
    "epsilon-curve",
]
THREAT = parse_threat("linf:0.1")


class _Around(nn.Module):
    """A network with something around it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class _Noisy(_Around):
    """A randomised defence: noise on every input."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images + 0.05 * torch.randn_like(images))


class _BatchDependent(_Around):
    """A model that normalises by its batch, as batch normalisation in train mode does."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) - self.model(images).mean(0)


class _OrderDependent(_Around):
    """A model whose answer depends on the place in the batch, as a leaking shape would make it."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) * (1.0 + 0.1 * torch.arange(len(images))[:, None])


class _Exposed(_Around):
    """A model that divides all images by the brightest of the batch, though never by less than most are bright."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images / images.flatten(1).mean(1).amax().clamp_min(0.6))


class _Quantising(_Around):
    """A defence by rounding pixels: its gradient is 0 everywhere, though it is as easily fooled as before."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images * 16).round() / 16)


class _CutOff(_Around):
    """A defence that hides the way back to the image."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.detach())


class _Saturated(_Around):
    """A defence by scaling: the logits are so far apart that the cross-entropy is 0 in float32, and so is its gradient."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) * 1e6


class _TooMany(_Around):
    """A model with an output that is no class."""

    def forward(self, images: Tensor) -> Tensor:
        return F.pad(self.model(images), (0, 1), value=-100.0)


class _Immune(nn.Module):
    """A model that knows the answers by their place: no epsilon makes it err."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.originals, self.answers = split.images, 10.0 * F.one_hot(split.targets, 10).float()

    def forward(self, images: Tensor) -> Tensor:
        return self.answers[self.places(images)] + 0.0 * images.sum()

    def places(self, images: Tensor) -> Tensor:
        return torch.arange(len(images)) % len(self.answers)


class _Fickle(_Immune):
    """A model that errs after a small or a very large perturbation, and not after one in between."""

    def forward(self, images: Tensor) -> Tensor:
        distance = (images - self.originals[self.places(images)]).flatten(1).abs().amax(1)
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


def _inspect(model: nn.Module, split: Split, **values: Any) -> dict[str, SanityCheck]:
    given: dict[str, Any] = {"num_classes": 10, "norm": "linf", "generator": torch.Generator().manual_seed(0), **values}
    checks = inspect_model(model, split.images, split.targets, **given)
    assert [check.name for check in checks] == NAMES
    return {check.name: check for check in checks}


def _failed(model: nn.Module, split: Split, **values: Any) -> set[str]:
    return {name for name, check in _inspect(model, split, **values).items() if check.outcome == "failed"}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_honest_model_passes_every_check(honest: nn.Module, test_split: Split, norm: str) -> None:
    """A plain classifier is not suspected, under either norm; progress is told to the end."""
    recorder = Recorder()
    found = _inspect(honest, test_split, norm=norm, on_progress=recorder)
    assert {check.outcome for check in found.values()} == {"passed"}
    assert recorder.told[-1][0] == recorder.told[-1][1]


def test_batch_normalisation_in_eval_mode_passes(other_classifier: Stage, test_split: Split) -> None:
    """A network with running statistics that it leaves alone is as good as one without."""
    assert _failed(load_classifier(other_classifier), test_split) == set()


def test_batch_normalisation_in_train_mode_is_found(other_classifier: Stage, test_split: Split) -> None:
    """Its answers depend on the batch, and reading it moves its statistics."""
    found = _inspect(load_classifier(other_classifier).train(), test_split)
    failed = {name for name, check in found.items() if check.outcome == "failed"}
    assert failed >= {"batch-of-one", "batch-padding", "running-statistics"}
    assert "running_mean" in found["running-statistics"].finding


def test_a_stochastic_model_is_found(honest: nn.Module, test_split: Split) -> None:
    """Two answers to the same image differ."""
    assert "deterministic" in _failed(_Noisy(honest), test_split)


def test_a_batch_dependent_model_is_found(honest: nn.Module, test_split: Split) -> None:
    """An image gets other logits alone than among others, though the same twice and in any order."""
    failed = _failed(_BatchDependent(honest), test_split)
    assert failed >= {"batch-of-one", "batch-padding"}
    assert not failed & {"deterministic", "batch-order"}


def test_an_order_dependent_model_is_found(honest: nn.Module, test_split: Split) -> None:
    """An image gets other logits at another place in the batch."""
    failed = _failed(_OrderDependent(honest), test_split)
    assert "batch-order" in failed
    assert "deterministic" not in failed


def test_strangers_in_the_batch_are_found(honest: nn.Module, test_split: Split) -> None:
    """What only images unlike the test images would disturb is seen, because some stand beside them."""
    assert _failed(_Exposed(honest), test_split) == {"batch-padding"}


def test_another_number_of_outputs_is_found(honest: nn.Module, test_split: Split) -> None:
    """An output without a class is a target that attacks waste their time on."""
    found = _inspect(_TooMany(honest), test_split)["class-count"]
    assert (found.outcome, found.finding) == ("failed", "11 outputs for 10 classes")


def test_a_model_that_outputs_probabilities_is_found(honest: nn.Module, test_split: Split) -> None:
    """Attacks need logits; rows that sum to 1 and are not negative are probabilities."""
    assert "logits" in _failed(nn.Sequential(honest, nn.Softmax(dim=1)), test_split)


@pytest.mark.parametrize("masking", [_Quantising, _CutOff])
def test_a_model_with_masked_gradients_is_found(honest: nn.Module, test_split: Split, masking: type[_Around]) -> None:
    """No gradient reaches the image; the finding counts the images."""
    found = _inspect(masking(honest), test_split)
    assert found["gradients"].outcome == "failed"
    assert found["gradients"].finding == "60 of 60 images have an all-zero gradient of the margin"
    assert found["saturation"].outcome == "passed"


def test_a_model_without_gradient_cannot_be_attacked(honest: nn.Module, test_split: Split) -> None:
    """Where PGD cannot even start, the checks that need it say so, and count as neither passed nor failed."""
    found = _inspect(_CutOff(honest), test_split)["epsilon-curve"]
    assert (found.outcome, found.finding) == ("not run", "no gradient reaches the image")
    again = _again(_CutOff(honest), test_split.images, test_split.targets)
    assert (again.outcome, again.finding) == ("not run", "no gradient reaches the image")


def test_a_saturated_softmax_is_found(honest: nn.Module, test_split: Split) -> None:
    """The cross-entropy of scaled logits has no gradient in float32 where the margin has one; nothing else is wrong."""
    found = _inspect(_Saturated(honest), test_split)
    assert {name for name, check in found.items() if check.outcome == "failed"} == {"saturation"}
    right = int((honest(test_split.images).argmax(1) == test_split.targets).sum())
    assert f" of {right} images the gradient of the cross-entropy vanishes" in found["saturation"].finding


def test_a_model_that_is_always_wrong_is_not_judged_by_its_loss(test_split: Split) -> None:
    """Where no image is classified correctly there is no confidence to saturate."""
    never = Linear(torch.zeros(11, 64), torch.eye(11)[10])
    found = _inspect(never, test_split)["saturation"]
    assert (found.outcome, found.finding) == ("not run", "no image is classified correctly")


@pytest.mark.parametrize("suspicious", [_Immune, _Fickle])
def test_a_curve_that_does_not_fall_to_chance_is_found(test_split: Split, suspicious: type[_Immune]) -> None:
    """Accuracy has to end at chance where epsilon can erase the image, and must not rise on the way there."""
    assert "epsilon-curve" in _failed(suspicious(test_split), test_split)


# Images that withstood every attack


class _Counting(_Around):
    """Counts how often it is read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.readings = 0

    def forward(self, images: Tensor) -> Tensor:
        self.readings += 1
        return self.model(images)


def _line(*distances: float) -> tuple[Linear, Tensor, Tensor]:
    """A linear model of two classes, and images of class 0 that become class 1 when every pixel changes by their distance."""
    direction = torch.where(torch.arange(64) % 3 == 0, 1.0, -1.0)
    model = Linear(torch.stack([direction, torch.zeros(64)]), torch.tensor([-0.5 * float(direction.sum()), 0.0]))
    images = torch.stack([0.5 + distance * direction for distance in distances]).view(-1, 1, 8, 8)
    return model, images, torch.zeros(len(distances), dtype=torch.int64)


def _again(model: nn.Module, images: Tensor, labels: Tensor, **values: Any) -> SanityCheck:
    given: dict[str, Any] = {"steps": 5, "generator": torch.Generator().manual_seed(0), **values}
    return attack_again(model, images, labels, THREAT, **given)


@pytest.mark.parametrize(
    ("near", "count", "outcome"),
    [(0, 8, "passed"), (1, 8, "passed"), (2, 8, "failed"), (3, 64, "passed"), (4, 64, "failed")],
)
def test_more_of_the_same_must_not_help(near: int, count: int, outcome: str) -> None:
    """Of images that were taken to withstand the attacks one, or one in twenty, may fall to a longer one."""
    model, images, labels = _line(*[0.09] * near, *[0.11] * (count - near))
    found = _again(model, images, labels)
    assert (found.outcome, found.finding.split(" images ")[0]) == (outcome, f"{near} of {count}")


def test_the_longer_attack_takes_ten_times_the_steps_from_five_starts() -> None:
    """On images that stand to the end the model is read that often, and progress is told; on none at all nothing is done."""
    model, images, labels = _line(0.11, 0.12)
    counting, recorder = _Counting(model), Recorder()
    _again(counting, images, labels, steps=3, on_progress=recorder)
    assert counting.readings == 1 + RESTARTS * (3 * FARTHER + 1)
    assert recorder.told == [(done, RESTARTS) for done in range(1, RESTARTS + 1)]
    nothing = _again(model, images[:0], labels[:0])
    assert (nothing.outcome, nothing.finding) == ("not run", "no image withstood the attacks")


def test_the_margin_is_attacked_where_the_cross_entropy_is_blind() -> None:
    """Logits scaled until their cross-entropy has no gradient hide nothing from the longer attack."""
    model, images, labels = _line(0.05, 0.06)
    assert _again(_Saturated(model), images, labels).finding.startswith("2 of 2 images")


def _transfer(model: nn.Module, twin: nn.Module | None, images: Tensor, labels: Tensor) -> SanityCheck:
    return attack_through_twin(model, twin, images, labels, THREAT, generator=torch.Generator().manual_seed(0))


def test_a_hidden_gradient_is_found_through_a_twin() -> None:
    """Images made on the model underneath fool the one that hides its gradient, which its own attack cannot."""
    model, images, labels = _line(*[0.05] * 8)
    masked = _Quantising(model)
    assert _again(masked, images, labels).finding.startswith("0 of 8 images")
    found = _transfer(masked, model, images, labels)
    assert (found.outcome, found.finding.split(" images ")[0]) == ("failed", "8 of 8")
    assert found.finding.endswith("(which itself errs on 8)")


def test_a_twin_need_not_harm_an_honest_model() -> None:
    """Images made on a model that looks at something else leave it standing."""
    model, images, labels = _line(*[0.05] * 8)
    other = Linear(model.weight.detach().roll(1, dims=1), model.bias.detach())
    found = _transfer(model, other, images, labels)
    assert (found.outcome, found.finding.split(" images ")[0]) == ("passed", "0 of 8")


def test_without_a_twin_nothing_is_known() -> None:
    """No other model, or no image that withstood: not run, and not passed."""
    model, images, labels = _line(0.11)
    alone, nothing = _transfer(model, None, images, labels), _transfer(model, model, images[:0], labels[:0])
    assert (alone.outcome, alone.finding) == ("not run", "there is no other model of the same data")
    assert (nothing.outcome, nothing.finding) == ("not run", "no image withstood the attacks")


def test_margins_are_positive_where_the_model_errs() -> None:
    """The best other logit less that of the label."""
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    assert margins(logits, torch.tensor([0, 2])).tolist() == [-1.0, 4.0]
