"""Projected gradient descent as a plain function, and a model that is as it was afterwards."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks import attack_pgd
from proxyrob.threat import Threat, parse_threat
from tests.toys import Linear, random_images, random_linear, same_state

LINF, L2 = parse_threat("linf:0.1"), parse_threat("l2:0.5")
IMAGES, LABELS = random_images(8), torch.arange(8)


def _attack(
    model: nn.Module,
    threat: Threat = LINF,
    *,
    steps: int = 5,
    relative_step: float = 0.25,
    seed: int = 0,
    scale: float = 1.0,
    start: Tensor | None = None,
) -> Tensor:
    return attack_pgd(
        model,
        IMAGES,
        lambda logits: F.cross_entropy(logits, LABELS, reduction="sum"),
        threat,
        steps=steps,
        relative_step=relative_step,
        generator=torch.Generator().manual_seed(seed),
        scale=scale,
        start=start,
    )


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 10))


@pytest.mark.parametrize("threat", [LINF, L2])
def test_the_attack_raises_the_loss_inside_the_threat_model(linear_model: Linear, threat: Threat) -> None:
    """Every image's loss is higher than before, every perturbation within ε, every pixel within [0,1]."""
    attacked = _attack(linear_model, threat, steps=20)
    before, after = (F.cross_entropy(linear_model(x), LABELS, reduction="none") for x in (IMAGES, attacked))
    assert bool((after > before).all())
    delta = (attacked - IMAGES).flatten(1)
    length = delta.abs().amax(1) if threat is LINF else delta.norm(dim=1)
    assert float(length.max()) <= float(threat.epsilon) + 1e-6
    assert float(length.min()) > 0.5 * float(threat.epsilon)
    assert 0.0 <= float(attacked.min()) <= float(attacked.max()) <= 1.0


def test_one_step_from_a_given_start_is_one_step(linear_model: Linear) -> None:
    """From the images themselves one L∞ step is x + relative_step·ε·sign(gradient), clipped to [0,1]."""
    images = IMAGES.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(linear_model(images), LABELS, reduction="sum"), images)
    expected = (IMAGES + 0.25 * 0.1 * gradient.sign()).clamp(0, 1)
    assert torch.allclose(_attack(linear_model, steps=1, start=IMAGES), expected, atol=1e-7)


def test_scale_shrinks_both_ball_and_step(linear_model: Linear) -> None:
    """A tenth of the threat model: one step is a tenth as long, and the ball a tenth as wide."""
    one_step = (_attack(linear_model, steps=1, start=IMAGES, scale=0.1) - IMAGES).abs().max().item()
    assert one_step == pytest.approx(0.25 * 0.1 * 0.1, rel=1e-4)
    many = (_attack(linear_model, steps=20, scale=0.1) - IMAGES).abs().max().item()
    assert many == pytest.approx(0.01, rel=1e-4)


def test_the_generator_decides_the_start(linear_model: Linear) -> None:
    """The same generator gives the same attack, another another; a given start makes it irrelevant."""
    assert torch.equal(_attack(linear_model, steps=1, seed=0), _attack(linear_model, steps=1, seed=0))
    assert not torch.equal(_attack(linear_model, steps=1, seed=0), _attack(linear_model, steps=1, seed=1))
    assert torch.equal(
        _attack(linear_model, steps=1, seed=0, start=IMAGES), _attack(linear_model, steps=1, seed=1, start=IMAGES)
    )


def test_the_result_carries_no_graph(linear_model: Linear) -> None:
    """Training on the attacked images does not differentiate through the attack."""
    attacked = _attack(linear_model)
    assert not attacked.requires_grad
    assert attacked.grad_fn is None


def test_the_model_is_as_it_was(linear_model: Linear) -> None:
    """Weights, running statistics, flags and gradients are untouched, also those of a part that was in eval mode."""
    model = _network().train()
    model[1].eval()
    model[5].bias.requires_grad_(False)  # pyright: ignore[reportCallIssue]  # a Parameter, though stubs say Tensor or Module
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()], [weight.requires_grad for weight in model.parameters()]
    _attack(model)
    assert same_state(model.state_dict(), state)
    assert ([module.training for module in model.modules()], [weight.requires_grad for weight in model.parameters()]) == flags
    assert all(weight.grad is None for weight in model.parameters())


def test_the_model_is_read_in_eval_mode() -> None:
    """Dropout and batch statistics do not disturb the attack: it is the same for a model in train mode."""
    in_train, in_eval = _network().train(), _network().eval()
    assert torch.equal(_attack(in_train), _attack(in_eval))


def test_an_image_is_attacked_alike_alone_and_in_a_batch() -> None:
    """The sum of losses is differentiated, so that no image's step depends on its neighbours."""
    model = random_linear()
    together = _attack(model, start=IMAGES)
    alone = attack_pgd(
        model,
        IMAGES[2:3],
        lambda logits: F.cross_entropy(logits, LABELS[2:3], reduction="sum"),
        LINF,
        steps=5,
        relative_step=0.25,
        generator=torch.Generator(),
        start=IMAGES[2:3],
    )
    assert torch.allclose(alone, together[2:3], atol=1e-6)
