"""Our losses against the published formulas, written out here plainly: value and gradient in float64, both norms.

The references step image by image, and are made of probabilities where ours are made of logits.
"""

from collections.abc import Callable
from copy import deepcopy
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks import random_start
from proxyrob.config import (
    AwpConfig,
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
from proxyrob.train import awp_gamma, losses_on, perturb_images, perturbed_weights
from proxyrob.train.objectives import mart_losses
from tests.toys import compute_losses

Objective = RobustObjective | SmoothObjective
Ascent = Callable[[Tensor], Tensor]

SEED, CLASSES, STEPS, RELATIVE_STEP = 3, 4, 5, 0.3
IMAGES = torch.rand(6, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CLASSES_OF = torch.tensor([0, 1, 2, 3, 0, 1])
MIXED_OF = torch.softmax(2 * torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(2), dtype=torch.float64), dim=1)
THREATS = {"linf": "linf:0.1", "l2": "l2:0.7"}
ATTACK: dict[str, Any] = {"attack_steps": STEPS, "relative_step": RELATIVE_STEP}

norms = pytest.mark.parametrize("norm", list(THREATS))
labellings = pytest.mark.parametrize("labels", [CLASSES_OF, MIXED_OF], ids=["classes", "shares"])


def _model() -> nn.Sequential:
    """A network with batch normalisation whose running statistics are not those of any batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(64, CLASSES)
        model = nn.Sequential(*layers).double().train()
        with torch.no_grad():
            model.state_dict()["1.running_mean"].normal_()
            model.state_dict()["1.running_var"].uniform_(0.5, 2.0)
            for parameter in model.parameters():
                parameter.mul_(2.0)
    return model


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator(), dtype=torch.float64)


def _shares(labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """The share of each class in each target."""
    shares = labels if labels.is_floating_point() else torch.eye(CLASSES, dtype=torch.float64)[labels]
    return (1.0 - smoothing) * shares + smoothing / CLASSES


def _cross_entropy(probabilities: Tensor, shares: Tensor) -> Tensor:
    return -(shares * probabilities.log()).sum(dim=1)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    return (first * (first / second).log()).sum(dim=1)


def _probabilities(model: nn.Module, images: Tensor) -> Tensor:
    return torch.softmax(model(images), dim=1)


def _ascend(images: Tensor, start: Tensor, loss: Ascent, norm: str) -> Tensor:
    """Madry et al. 2018: signed (or unit) steps, then back into the ball and into [0,1]."""
    epsilon = float(parse_threat(THREATS[norm]).epsilon)
    step = RELATIVE_STEP * epsilon
    current = start
    for _ in range(STEPS):
        current = current.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(current).sum(), current)
        moved = []
        for image, at, slope in zip(images, current.detach(), gradient, strict=True):
            if norm == "linf":
                delta = (at + step * slope.sign() - image).clamp(-epsilon, epsilon)
            else:
                delta = at + step * slope / slope.square().sum().sqrt() - image
                delta = delta * min(1.0, epsilon / delta.square().sum().sqrt().item())
            moved.append((image + delta).clamp(0.0, 1.0))
        current = torch.stack(moved)
    return current.detach()


def _attack_model(model: nn.Module, batchnorm: str) -> nn.Module:
    """A copy whose statistics may move."""
    return deepcopy(model).train(batchnorm == "train")


def _same(objective: Objective, expected: Callable[[nn.Module], Tensor], labels: Tensor, norm: str | None = None) -> None:
    """Value, gradient of every weight, and running statistics but for how often a clean batch was counted."""
    ours, theirs = _model(), _model()
    found = compute_losses(
        objective,
        ours,
        IMAGES,
        labels,
        threat=parse_threat(THREATS[norm]) if norm else None,
        scale=1.0,
        generator=_generator(),
    ).losses
    reference = expected(theirs)
    assert found.shape == reference.shape == (6,)
    assert torch.allclose(found, reference, rtol=1e-9, atol=1e-12)
    found.mean().backward()
    reference.mean().backward()
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert bool((other.grad != 0).any())
        assert torch.allclose(one.grad, other.grad, rtol=1e-7, atol=1e-10), name
    for name, buffer in theirs.named_buffers():
        assert torch.allclose(ours.state_dict()[name], buffer), name


@labellings
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_natural(labels: Tensor, smoothing: float) -> None:
    """-Σ q log p, with q the target, of which label smoothing spreads a share over all classes (Szegedy et al. 2016)."""

    def expected(model: nn.Module) -> Tensor:
        return _cross_entropy(_probabilities(model, IMAGES), _shares(labels, smoothing))

    _same(NaturalObjective(label_smoothing=smoothing), expected, labels)


@norms
@labellings
@pytest.mark.parametrize(("batchnorm", "start", "smoothing"), [("eval", "uniform", 0.0), ("train", "gaussian", 0.1)])
def test_pgd(norm: str, labels: Tensor, batchnorm: Any, start: Any, smoothing: float) -> None:
    """Madry et al. 2018: cross-entropy where it is largest in the ball, as projected ascent finds it."""

    def expected(model: nn.Module) -> Tensor:
        attacked_model = _attack_model(model, batchnorm)
        begin = IMAGES + 0.001 * _noise(*IMAGES.shape)
        if start == "uniform":
            begin = random_start(IMAGES, parse_threat(THREATS[norm]), _generator())
        attacked = _ascend(
            IMAGES, begin, lambda images: _cross_entropy(_probabilities(attacked_model, images), _shares(labels)), norm
        )
        return _cross_entropy(_probabilities(model, attacked), _shares(labels, smoothing))

    objective = PgdObjective(attack_batchnorm=batchnorm, attack_start=start, label_smoothing=smoothing, **ATTACK)
    _same(objective, expected, labels, norm)


@norms
@labellings
@pytest.mark.parametrize(
    ("batchnorm", "start", "smoothing"), [("eval", "gaussian", 0.0), ("train", "uniform", 0.1)], ids=["Zhang", "Wang"]
)
def test_trades(norm: str, labels: Tensor, batchnorm: Any, start: Any, smoothing: float) -> None:
    """Zhang et al. 2019, and with the settings of Wang et al. 2023: CE(p, q) + β·KL(p ‖ p'), p' where the KL is largest."""

    def expected(model: nn.Module) -> Tensor:
        attacked_model = _attack_model(model, batchnorm)
        natural = _probabilities(attacked_model, IMAGES).detach()
        begin = IMAGES + 0.001 * _noise(*IMAGES.shape)
        if start == "uniform":
            begin = random_start(IMAGES, parse_threat(THREATS[norm]), _generator())
        attacked = _ascend(IMAGES, begin, lambda images: _kl(natural, _probabilities(attacked_model, images)), norm)
        clean, perturbed = _probabilities(model, IMAGES), _probabilities(model, attacked)
        return _cross_entropy(clean, _shares(labels, smoothing)) + 5.0 * _kl(clean, perturbed)

    objective = TradesObjective(beta=5.0, attack_batchnorm=batchnorm, attack_start=start, label_smoothing=smoothing, **ATTACK)
    _same(objective, expected, labels, norm)


def _mart(clean: Tensor, attacked: Tensor, label: int, beta: float) -> Tensor:
    """Wang et al. 2020 for one image: BCE(p', y) + β·KL(p ‖ p')·(1 - p_y)."""
    others = [attacked[k] for k in range(CLASSES) if k != label]
    boosted = -attacked[label].log() - (1.0 - torch.stack(others).max()).log()
    return boosted + beta * (clean * (clean / attacked).log()).sum() * (1.0 - clean[label])


@norms
@labellings
def test_mart(norm: str, labels: Tensor) -> None:
    """Wang et al. 2020; with shares of classes, the mean of the classes' losses."""

    def expected(model: nn.Module) -> Tensor:
        attacked_model = _attack_model(model, "eval")
        begin = IMAGES + 0.001 * _noise(*IMAGES.shape)
        attacked = _ascend(
            IMAGES, begin, lambda images: _cross_entropy(_probabilities(attacked_model, images), _shares(labels)), norm
        )
        clean, perturbed = _probabilities(model, IMAGES), _probabilities(model, attacked)
        of_class = [[_mart(clean[i], perturbed[i], label, 6.0) for label in range(CLASSES)] for i in range(len(IMAGES))]
        return (_shares(labels) * torch.stack([torch.stack(row) for row in of_class])).sum(dim=1)

    _same(MartObjective(beta=6.0, **ATTACK), expected, labels, norm)


@labellings
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_stability(labels: Tensor, smoothing: float) -> None:
    """CE(p(x), q) + β·KL(p(x) ‖ p(x + δ)) with δ normal of deviation σ."""

    def expected(model: nn.Module) -> Tensor:
        clean, noisy = _probabilities(model, IMAGES), _probabilities(model, IMAGES + 0.25 * _noise(*IMAGES.shape))
        return _cross_entropy(clean, _shares(labels, smoothing)) + 6.0 * _kl(clean, noisy)

    _same(StabilityObjective(label_smoothing=smoothing), expected, labels)


@labellings
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gaussian(labels: Tensor, smoothing: float) -> None:
    """Cohen et al. 2019: cross-entropy under normal noise."""

    def expected(model: nn.Module) -> Tensor:
        noisy = _probabilities(model, IMAGES + 0.5 * _noise(*IMAGES.shape))
        return _cross_entropy(noisy, _shares(labels, smoothing))

    _same(GaussianObjective(sigma=0.5, label_smoothing=smoothing), expected, labels)


@norms
@labellings
@pytest.mark.parametrize(("num_noise", "smoothing", "batchnorm"), [(1, 0.0, "eval"), (3, 0.1, "train")])
def test_smoothadv(norm: str, labels: Tensor, num_noise: int, smoothing: float, batchnorm: Any) -> None:
    """Salman et al. 2019: the attack maximises -log of the mean probability under m noises; each of them is then trained on."""

    def expected(model: nn.Module) -> Tensor:
        attacked_model = _attack_model(model, batchnorm)
        noise = 0.25 * _noise(num_noise * len(IMAGES), *IMAGES.shape[1:]).view(len(IMAGES), num_noise, *IMAGES.shape[1:])

        def smoothed(images: Tensor) -> Tensor:
            copies = (images[:, None] + noise).flatten(0, 1)
            mean = _probabilities(attacked_model, copies).view(len(images), num_noise, CLASSES).mean(dim=1)
            return _cross_entropy(mean, _shares(labels))

        attacked = _ascend(IMAGES, IMAGES, smoothed, norm)
        probabilities = _probabilities(model, (attacked[:, None] + noise).flatten(0, 1)).view(len(IMAGES), num_noise, CLASSES)
        losses = [_cross_entropy(probabilities[:, i], _shares(labels, smoothing)) for i in range(num_noise)]
        return torch.stack(losses).mean(dim=0)

    objective = SmoothAdvObjective(
        threat=parse_threat(THREATS[norm]),
        num_noise=num_noise,
        label_smoothing=smoothing,
        attack_batchnorm=batchnorm,
        **ATTACK,
    )
    _same(objective, expected, labels)


AWP_OBJECTIVES = [
    NaturalObjective(awp=AwpConfig(gamma=0.02)),
    PgdObjective(awp=AwpConfig(gamma=0.02), **ATTACK),
    TradesObjective(awp=AwpConfig(gamma=0.02), **ATTACK),
    MartObjective(awp=AwpConfig(gamma=0.02), **ATTACK),
    StabilityObjective(awp=AwpConfig(gamma=0.02)),
    GaussianObjective(awp=AwpConfig(gamma=0.02)),
    SmoothAdvObjective(awp=AwpConfig(gamma=0.02), **ATTACK),
]


@norms
@labellings
@pytest.mark.parametrize("objective", AWP_OBJECTIVES, ids=lambda objective: objective.kind)
def test_weight_perturbation(objective: Objective, labels: Tensor, norm: str) -> None:
    """Wu et al. 2020: a copy takes one step up the loss; the weights move as it did, at γ of their length; then the gradient.

    The step after it gives the weights w - lr·∇L(w + v), as perturbing, stepping and restoring do.
    """
    model, reference = _model(), _model()
    threat = parse_threat(THREATS[norm])
    batch = perturb_images(objective, model, IMAGES, labels, threat=threat, scale=1.0, generator=_generator())

    def loss() -> Tensor:
        return losses_on(objective, model, batch).losses.mean()

    with perturbed_weights(model, awp_gamma(objective.awp, 0, 10), lambda: [loss()]):
        found = loss()
        found.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()

    proxy = deepcopy(reference)
    losses_on(objective, proxy, batch).losses.mean().mul(-1).backward()
    torch.optim.SGD(proxy.parameters(), lr=0.01).step()
    moves = {}
    for (name, weight), (_, stepped) in zip(reference.named_parameters(), proxy.named_parameters(), strict=True):
        if name in {"0.weight", "4.weight"}:
            difference = (stepped - weight).detach()
            moves[name] = 0.02 * difference * weight.detach().norm() / difference.norm()
    with torch.no_grad():
        for name, move in moves.items():
            reference.get_parameter(name).add_(move)
    expected = losses_on(objective, reference, batch).losses.mean()
    expected.backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    with torch.no_grad():
        for name, move in moves.items():
            reference.get_parameter(name).sub_(move)

    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    assert found.item() > losses_on(objective, _model(), batch).losses.mean().item(), "the loss is larger there"
    for name, value in reference.state_dict().items():
        assert torch.allclose(model.state_dict()[name].double(), value.double(), rtol=1e-9, atol=1e-10), name


def test_label_smoothing_of_classes_is_the_textbooks() -> None:
    """(1 - s)·(-log p_y) + s·mean of (-log p_k), as in the recipe of Wang et al. 2023."""
    model = _model()
    logarithms = F.log_softmax(model(IMAGES), dim=1)
    expected = -0.9 * logarithms[range(6), CLASSES_OF] - 0.1 * logarithms.mean(dim=1)
    found = compute_losses(
        NaturalObjective(label_smoothing=0.1),
        model,
        IMAGES,
        CLASSES_OF,
        threat=None,
        scale=1.0,
        generator=_generator(),
    )
    assert torch.allclose(found.losses, expected)


def test_mart_is_finite_where_the_attack_has_won_entirely() -> None:
    """With another class at probability 1 the margin grows with the logits and keeps its gradient, and nothing is infinite."""
    clean = torch.zeros(1, CLASSES, dtype=torch.float64)
    attacked = torch.tensor([[0.0, 60.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = mart_losses(clean, attacked, torch.tensor([0]), beta=0.0)
    assert loss.item() == pytest.approx(60.0 + 60.0 - log(3), rel=1e-9)
    (gradient,) = torch.autograd.grad(loss.sum(), attacked)
    assert gradient[0].tolist() == pytest.approx([-1.0 - 1 / 3, 2.0, -1 / 3, -1 / 3])
