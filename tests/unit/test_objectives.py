"""What training minimises, against the formulas."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks import attack_pgd
from proxyrob.config import (
    GaussianObjective,
    MartObjective,
    NaturalObjective,
    PgdObjective,
    RobustObjective,
    SmoothAdvObjective,
    SmoothObjective,
    StabilityObjective,
    TradesObjective,
)
from proxyrob.threat import parse_threat
from proxyrob.train import perturb_images
from proxyrob.train.objectives import LossParts, divergence, mart_losses
from tests.toys import compute_losses, random_images, same_state

IMAGES, LABELS = random_images(6), torch.tensor([0, 1, 2, 3, 4, 5])
THREAT = parse_threat("linf:0.1")
PGD = PgdObjective(attack_steps=3)
TRADES = TradesObjective(attack_steps=3)
MART = MartObjective(attack_steps=3)
STABILITY = StabilityObjective(beta=2.0, sigma=0.5)
GAUSSIAN = GaussianObjective(sigma=0.5)
SMOOTHADV = SmoothAdvObjective(sigma=0.5, attack_steps=3)
EVERY = [NaturalObjective(), PGD, TRADES, MART, STABILITY, GAUSSIAN, SMOOTHADV]
ATTACKED = [PGD, TRADES, MART, SMOOTHADV]

Objective = RobustObjective | SmoothObjective
Attacked = PgdObjective | TradesObjective | MartObjective | SmoothAdvObjective
Smoothed = NaturalObjective | PgdObjective | TradesObjective | StabilityObjective | GaussianObjective | SmoothAdvObjective

by_kind: Any = {"ids": lambda objective: objective.kind}


@pytest.fixture
def model() -> nn.Sequential:
    """A network with batch normalisation, in train mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).train()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _compute(objective: Objective, model: nn.Module, scale: float = 1.0, labels: Tensor = LABELS) -> LossParts:
    return compute_losses(objective, model, IMAGES, labels, threat=THREAT, scale=scale, generator=_generator())


def _perturb(objective: Objective, model: nn.Module, images: Tensor = IMAGES, scale: float = 1.0) -> Tensor:
    batch = perturb_images(objective, model, images, LABELS, threat=THREAT, scale=scale, generator=_generator())
    return batch.perturbed


def _cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, LABELS, reduction="none")


def test_the_divergence_is_that_of_the_textbook() -> None:
    """KL(softmax(a) ‖ softmax(b)) per image, as torch computes it; 0 for equal logits, not symmetric."""
    first, second = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(5, 4)
    expected = F.kl_div(F.log_softmax(second, 1), F.log_softmax(first, 1), reduction="none", log_target=True).sum(1)
    assert torch.allclose(divergence(first, second), expected, atol=1e-6)
    assert torch.equal(divergence(first, first), torch.zeros(5))
    assert not torch.allclose(divergence(first, second), divergence(second, first), atol=1e-2)


def test_the_divergence_has_gradients_through_both() -> None:
    """Neither argument is detached: TRADES trains the clean logits too."""
    first, second = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    divergence(first, second).sum().backward()
    assert first.grad is not None
    assert second.grad is not None
    assert bool((first.grad != 0).any())
    assert bool((second.grad != 0).any())


def test_natural_training_is_cross_entropy(model: nn.Sequential) -> None:
    """One cross-entropy per image, on unperturbed images, in train mode."""
    logits = model(IMAGES)
    found = _compute(NaturalObjective(), model)
    assert torch.equal(found.logits, logits)
    assert torch.equal(found.losses, _cross_entropy(logits))


def test_pgd_training_is_cross_entropy_on_attacked_images(model: nn.Sequential) -> None:
    """The attack is that of ``attack_pgd`` with the objective's own settings; the loss is taken in the caller's mode."""
    fresh = deepcopy(model)
    attacked = attack_pgd(
        fresh,
        IMAGES,
        lambda logits: _cross_entropy(logits).sum(),
        THREAT,
        steps=3,
        relative_step=0.25,
        generator=torch.Generator().manual_seed(7),
        scale=0.5,
    )
    expected = _cross_entropy(fresh(attacked))
    assert torch.equal(_compute(PGD, deepcopy(model), scale=0.5).losses, expected)
    for other in (PgdObjective(attack_steps=1), PgdObjective(attack_steps=3, relative_step=1.0)):
        assert not torch.allclose(_compute(other, deepcopy(model), scale=0.5).losses, expected)
    assert not torch.allclose(_compute(PGD, deepcopy(model), scale=1.0).losses, expected)


def test_stability_training_is_the_formula(model: nn.Sequential) -> None:
    """Cross-entropy of the clean image plus beta times the divergence under noise of scale·sigma, not clipped."""
    noise = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(7))
    clean, noisy = model(IMAGES), model(IMAGES + 0.5 * 0.4 * noise)
    found = _compute(STABILITY, model, scale=0.4)
    assert torch.allclose(found.losses, _cross_entropy(clean) + 2.0 * divergence(clean, noisy), atol=1e-6)
    assert torch.equal(found.logits, noisy)


@pytest.mark.parametrize("objective", [PGD, TRADES, STABILITY, GAUSSIAN], **by_kind)
def test_without_perturbation_only_cross_entropy_is_left(model: nn.Sequential, objective: Objective) -> None:
    """At scale 0, the start of the warm-up, these objectives are natural training."""
    assert torch.allclose(_compute(objective, model, scale=0.0).losses, _cross_entropy(model(IMAGES)), atol=1e-5)


@pytest.mark.parametrize("objective", EVERY, **by_kind)
def test_every_weight_gets_a_gradient_from_every_image(model: nn.Sequential, objective: Objective) -> None:
    """There is one loss per image, each with a gradient, and weights are trained again after the attack froze them."""
    found = _compute(objective, model)
    assert (found.losses.shape, found.logits.shape) == ((6,), (6, 10))
    for loss in found.losses:
        gradients = torch.autograd.grad(loss, tuple(model.parameters()), retain_graph=True)
        assert all(bool((gradient != 0).any()) for gradient in gradients if gradient.shape != (4,))


@pytest.mark.parametrize("objective", EVERY, **by_kind)
def test_the_mode_stays_as_the_caller_set_it(model: nn.Sequential, objective: Objective) -> None:
    """A part that the caller put into eval mode is still in eval mode, the rest in train mode."""
    model[1].eval()
    flags = [module.training for module in model.modules()]
    _compute(objective, model)
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
@pytest.mark.parametrize("objective", ATTACKED, **by_kind)
def test_the_attack_moves_no_running_statistic(model: nn.Sequential, objective: Attacked, batchnorm: str) -> None:
    """Batch statistics are counted for the batches that are trained on, never inside the attack, whatever that reads."""
    before, flags = deepcopy(model.state_dict()), [module.training for module in model.modules()]
    objective = objective.replace(attack_batchnorm=batchnorm)
    _perturb(objective, model)
    assert same_state(model.state_dict(), before)
    assert [module.training for module in model.modules()] == flags
    assert [module.track_running_stats for module in model.modules() if isinstance(module, nn.BatchNorm2d)] == [True]
    _compute(objective, model)
    trained = int(model.state_dict()["1.num_batches_tracked"]) - int(before["1.num_batches_tracked"])
    assert trained == (2 if isinstance(objective, TradesObjective | MartObjective) else 1)


@pytest.mark.parametrize("objective", ATTACKED, **by_kind)
def test_the_attack_reads_the_statistics_that_are_asked_for(model: nn.Sequential, objective: Attacked) -> None:
    """In eval mode, the default of every loss, an image is attacked alike in any batch; in train mode the others matter."""
    other = torch.cat([IMAGES[:1], 1.0 - IMAGES[1:]])
    assert torch.equal(_perturb(objective, model)[0], _perturb(objective, model, other)[0])
    of_batch = objective.replace(attack_batchnorm="train")
    assert not torch.equal(_perturb(of_batch, model)[0], _perturb(of_batch, model, other)[0])


def test_statistics_that_the_caller_froze_stay_frozen_in_the_attack(model: nn.Sequential) -> None:
    """A layer in eval mode is read in eval mode, whatever the attack reads elsewhere."""
    model[1].eval()
    assert torch.equal(_perturb(PGD.replace(attack_batchnorm="train"), model), _perturb(PGD, model))


@pytest.mark.parametrize("objective", [objective for objective in EVERY if objective is not MART], **by_kind)
def test_no_label_smoothing_is_the_plain_loss(model: nn.Sequential, objective: Smoothed) -> None:
    """Smoothing 0 gives the same bits as the loss without; 0.1 gives another loss of the same perturbed images."""
    plain = _compute(objective, deepcopy(model))
    assert torch.equal(_compute(objective.replace(label_smoothing=0.0), deepcopy(model)).losses, plain.losses)
    smoothed = _compute(objective.replace(label_smoothing=0.1), deepcopy(model))
    assert not torch.allclose(smoothed.losses, plain.losses, atol=1e-4)
    assert torch.equal(smoothed.logits, plain.logits)


@pytest.mark.parametrize("objective", EVERY, **by_kind)
def test_a_class_is_a_share_of_one(model: nn.Sequential, objective: Objective) -> None:
    """A target that is all of one class is that class."""
    expected = _compute(objective, deepcopy(model))
    found = _compute(objective, deepcopy(model), labels=F.one_hot(LABELS, 10).float())
    assert torch.allclose(found.losses, expected.losses, atol=1e-5)


def test_mart_of_shares_is_the_mean_over_the_classes() -> None:
    """As CutMix has it: λ of one class and 1-λ of another give λ times the one's loss and 1-λ times the other's."""
    clean, attacked = (torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    one, other = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 4, 1, 3])
    shares = 0.3 * F.one_hot(one, 5) + 0.7 * F.one_hot(other, 5)
    expected = 0.3 * mart_losses(clean, attacked, one, 6.0) + 0.7 * mart_losses(clean, attacked, other, 6.0)
    assert torch.allclose(mart_losses(clean, attacked, shares, 6.0), expected, atol=1e-5)


def test_noise_is_not_shrunk_around_an_attack_that_is(model: nn.Sequential) -> None:
    """At scale 0 SmoothAdv is training under Gaussian noise, with as many samples as it takes."""
    noise = torch.randn(12, 1, 8, 8, generator=_generator())
    found = _perturb(SMOOTHADV, model, scale=0.0)
    assert torch.allclose(found, IMAGES.repeat_interleave(2, dim=0) + 0.5 * noise, atol=1e-6)


@pytest.mark.parametrize("threat", ["linf:0.1", "l2:0.4"])
def test_smoothadv_stays_in_its_own_threat_model(model: nn.Sequential, threat: str) -> None:
    """The noise apart, the copies of an image are one valid image in the ball, and some go to its edge."""
    objective = SMOOTHADV.replace(threat=parse_threat(threat), relative_step=1.0)
    noise = 0.5 * torch.randn(12, 1, 8, 8, generator=_generator())
    attacked = (_perturb(objective, model) - noise).view(6, 2, 1, 8, 8)
    assert torch.allclose(attacked[:, 0], attacked[:, 1], atol=1e-5)
    assert -1e-5 < attacked.min() <= attacked.max() < 1.0 + 1e-5
    deltas = (attacked[:, 0] - IMAGES).flatten(1)
    lengths = deltas.abs().amax(dim=1) if threat.startswith("linf") else deltas.norm(dim=1)
    epsilon = float(objective.threat.epsilon)
    assert 0.95 * epsilon < lengths.max() <= epsilon + 1e-4


@pytest.mark.parametrize("objective", [PGD, TRADES, MART], **by_kind)
def test_an_adversarial_objective_without_threat_model_is_refused(model: nn.Sequential, objective: Objective) -> None:
    """There is no default epsilon."""
    with pytest.raises(ValueError, match="expected a threat model for an adversarial objective, got None"):
        compute_losses(objective, model, IMAGES, LABELS, threat=None, scale=1.0, generator=torch.Generator())
