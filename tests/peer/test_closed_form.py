"""Attacks and certificates on linear classifiers, whose answers are known in closed form."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from proxyrob.attacks import attack_pgd
from proxyrob.certify import certify_image, certify_sequentially, design_looks
from proxyrob.threat import Threat, parse_threat
from tests.toys import Linear, random_images

LABELS = torch.zeros(16, dtype=torch.int64)


def _two_classes(seed: int = 0) -> Linear:
    """Logits (0, w·x + b): the loss of class 0 grows along w."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, generator=generator)
    return Linear(torch.stack([torch.zeros(64), weight]), torch.tensor([0.0, 0.3]))


def _losses(model: Linear, images: Tensor) -> Tensor:
    return F.cross_entropy(model(images), LABELS, reduction="none")


def _attack(model: Linear, images: Tensor, threat: Threat) -> Tensor:
    return attack_pgd(
        model,
        images,
        lambda logits: F.cross_entropy(logits, LABELS, reduction="sum"),
        threat,
        steps=40,
        relative_step=0.125,
        generator=torch.Generator().manual_seed(0),
    )


@pytest.mark.parametrize("spread", [1.0, 0.2])
def test_pgd_reaches_the_optimum_in_the_linf_ball(spread: float) -> None:
    """The worst image is x + ε·sign(w), clipped to [0,1]; PGD ends there from a random start, at the border and inside."""
    model, threat = _two_classes(), parse_threat("linf:0.1")
    images = 0.5 + spread * (random_images(16) - 0.5)
    optimum = (images + 0.1 * model.weight[1].detach().sign().view(1, 1, 8, 8)).clamp(0, 1)
    attacked = _attack(model, images, threat)
    assert torch.allclose(attacked, optimum, atol=1e-6)
    assert torch.allclose(_losses(model, attacked), _losses(model, optimum), atol=1e-5)
    assert bool((_losses(model, attacked) > _losses(model, images) + 0.01).all())


def test_pgd_reaches_the_optimum_in_the_l2_ball() -> None:
    """Away from black and white the worst image is x + ε·w/‖w‖."""
    model, threat = _two_classes(), parse_threat("l2:0.4")
    images = 0.5 + 0.2 * (random_images(16) - 0.5)
    optimum = images + 0.4 * (model.weight[1] / model.weight[1].norm()).detach().view(1, 1, 8, 8)
    attacked = _attack(model, images, threat)
    assert torch.allclose(_losses(model, attacked), _losses(model, optimum), rtol=1e-3)
    assert bool((_losses(model, attacked) <= _losses(model, optimum) + 1e-5).all()), "nothing in the ball is worse"


def _certified(weight: Tensor, image: Tensor, sigma: float, n: int, seed: int) -> float:
    model = Linear(torch.stack([torch.zeros(4), weight]))
    row = certify_image(
        model,
        image,
        sigma=sigma,
        n0=100,
        n=n,
        alpha=0.001,
        batch_size=50_000,
        select=torch.Generator().manual_seed(seed),
        estimate=torch.Generator().manual_seed(1000 + seed),
    )
    assert row["prediction"] == 1
    radius = row["radius_l2"]
    assert isinstance(radius, float)
    return radius


@pytest.mark.parametrize("sigma", [0.25, 0.5])
def test_a_certificate_approaches_the_distance_to_the_boundary_from_below(sigma: float) -> None:
    """Smoothing leaves a linear boundary where it is: no radius exceeds the true distance, and with n it comes near."""
    weight = torch.tensor([3.0, -1.0, 2.0, 0.5])
    for seed, share in enumerate((0.5, 1.0, 1.5, 2.0)):
        distance = share * sigma
        image = (distance * weight / weight.norm()).view(1, 2, 2)  # at this distance from the plane through the origin
        few, many = (_certified(weight, image, sigma, n, seed) for n in (1_000, 100_000))
        assert 0.0 < few < many <= distance
        assert many > distance - 0.04 * sigma


def test_the_share_of_false_certificates_is_within_alpha() -> None:
    """With a large alpha the radius exceeds the true distance about that often, and not much more often: the bound is used."""
    weight, sigma, alpha, runs = torch.tensor([1.0, 0.0, 0.0, 0.0]), 0.25, 0.2, 300
    image = (0.2 * weight).view(1, 2, 2)
    model = Linear(torch.stack([torch.zeros(4), weight]))
    exceeding = 0
    for seed in range(runs):
        select, estimate = (torch.Generator().manual_seed(10_000 * k + seed) for k in (1, 2))
        row = certify_image(
            model, image, sigma=sigma, n0=10, n=100, alpha=alpha, batch_size=100, select=select, estimate=estimate
        )
        radius = row["radius_l2"]
        assert isinstance(radius, float)
        exceeding += radius > 0.2
    assert 0.05 * runs < exceeding < alpha * runs + 3 * math.sqrt(runs * alpha * (1 - alpha))


def test_the_share_of_false_sequential_certificates_is_within_alpha() -> None:
    """The same where sampling stops early: that often at most beyond the true distance, and nearly always well within it."""
    weight, sigma, alpha, runs = torch.tensor([1.0, 0.0, 0.0, 0.0]), 0.25, 0.2, 600
    images = (0.2 * weight).view(1, 1, 2, 2).expand(runs, 1, 2, 2)
    model = Linear(torch.stack([torch.zeros(4), weight]))
    radii = (0.0, 0.1, 0.201, 0.3)
    design = design_looks(radii, sigma=sigma, n=200, alpha=alpha, looks=20, early_share=0.5, futility=0.01)
    select, estimate = ([torch.Generator().manual_seed(10_000 * k + seed) for seed in range(runs)] for k in (1, 2))
    rows = certify_sequentially(model, images, design, sigma=sigma, n0=10, batch_size=2000, select=select, estimate=estimate)
    certified = np.array([row["radius_l2"] for row in rows])
    assert 0.05 * runs < (certified > 0.2).sum() < alpha * runs + 3 * math.sqrt(runs * alpha * (1 - alpha))
    assert (certified >= 0.1).mean() > 0.9
