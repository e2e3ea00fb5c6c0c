"""What training minimises, against the formulas."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks import attack_pgd
from proxyrob.config import NaturalObjective, PgdObjective, StabilityObjective, TradesObjective
from proxyrob.threat import parse_threat
from proxyrob.train import compute_losses
from proxyrob.train.objectives import LossParts, divergence
from tests.toys import random_images

IMAGES, LABELS = random_images(6), torch.tensor([0, 1, 2, 3, 4, 5])
THREAT = parse_threat("linf:0.1")
PGD = PgdObjective(attack_steps=3)
TRADES = TradesObjective(attack_steps=3)
STABILITY = StabilityObjective(beta=2.0, sigma=0.5)

Objective = NaturalObjective | PgdObjective | TradesObjective | StabilityObjective


@pytest.fixture
def model() -> nn.Sequential:
    """A network with batch normalisation, in train mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).train()


def _compute(objective: Objective, model: nn.Module, scale: float = 1.0) -> LossParts:
    generator = torch.Generator().manual_seed(7)
    return compute_losses(objective, model, IMAGES, LABELS, threat=THREAT, scale=scale, generator=generator)


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


@pytest.mark.parametrize("objective", [PGD, TRADES, STABILITY])
def test_without_perturbation_only_cross_entropy_is_left(model: nn.Sequential, objective: Objective) -> None:
    """At scale 0, the start of the warm-up, every objective is natural training."""
    assert torch.allclose(_compute(objective, model, scale=0.0).losses, _cross_entropy(model(IMAGES)), atol=1e-5)


@pytest.mark.parametrize("objective", [NaturalObjective(), PGD, TRADES, STABILITY])
def test_every_weight_gets_a_gradient_from_every_image(model: nn.Sequential, objective: Objective) -> None:
    """There is one loss per image, each with a gradient, and weights are trained again after the attack froze them."""
    found = _compute(objective, model)
    assert (found.losses.shape, found.logits.shape) == ((6,), (6, 10))
    for loss in found.losses:
        gradients = torch.autograd.grad(loss, tuple(model.parameters()), retain_graph=True)
        assert all(bool((gradient != 0).any()) for gradient in gradients if gradient.shape != (4,))


@pytest.mark.parametrize("objective", [NaturalObjective(), PGD, TRADES, STABILITY])
def test_the_mode_stays_as_the_caller_set_it(model: nn.Sequential, objective: Objective) -> None:
    """A part that the caller put into eval mode is still in eval mode, the rest in train mode."""
    model[1].eval()
    flags = [module.training for module in model.modules()]
    _compute(objective, model)
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("objective", [PGD, TRADES])
def test_the_attack_moves_no_running_statistic(model: nn.Sequential, objective: Objective) -> None:
    """Batch statistics are counted for the batches that are trained on (one, with TRADES two), never inside the attack."""
    before = int(model[1].num_batches_tracked)  # pyright: ignore[reportArgumentType]  # a buffer, though stubs say Tensor or Module
    _compute(objective, model)
    trained = int(model[1].num_batches_tracked) - before  # pyright: ignore[reportArgumentType]
    assert trained == (2 if objective is TRADES else 1)


@pytest.mark.parametrize("objective", [PGD, TRADES])
def test_an_adversarial_objective_without_threat_model_is_refused(model: nn.Sequential, objective: Objective) -> None:
    """There is no default epsilon."""
    with pytest.raises(ValueError, match="expected a threat model for an adversarial objective, got None"):
        compute_losses(objective, model, IMAGES, LABELS, threat=None, scale=1.0, generator=torch.Generator())
