"""Projection and random starts, for any image, perturbation and threat model."""

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from proxyrob.attacks import project, random_start
from proxyrob.threat import LARGEST_EPSILON, Norm, Threat

ROUNDING = 2e-6


@st.composite
def threats(draw: st.DrawFn) -> Threat:
    """Any threat model."""
    norm: Norm = draw(st.sampled_from(["linf", "l2"]))
    share = draw(st.fractions(Fraction(1, 1000), Fraction(1), max_denominator=1000))
    return Threat(norm, share * LARGEST_EPSILON[norm])


@st.composite
def images(draw: st.DrawFn) -> Tensor:
    """Images in [0,1], many of them at the border."""
    seed, sharpness = draw(st.integers(0, 2**32)), draw(st.sampled_from([1.0, 3.0]))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)))
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return ((uniform - 0.5) * sharpness + 0.5).clamp(0, 1)


def _length(delta: Tensor, norm: Norm) -> Tensor:
    return delta.flatten(1).abs().amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)


@given(images(), threats(), st.integers(0, 2**32), st.floats(0.0, 20.0), st.floats(0.01, 1.0))
def test_a_projection_is_inside_ball_and_box_and_stays(x: Tensor, threat: Threat, seed: int, size: float, scale: float) -> None:
    """Whatever is projected lies within ε·scale of the image and within [0,1], and projecting it again changes nothing."""
    perturbed = x + size * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    found = project(perturbed, x, threat, scale)
    assert float(_length(found - x, threat.norm).max()) <= scale * float(threat.epsilon) + ROUNDING
    assert float(found.min()) >= 0.0
    assert float(found.max()) <= 1.0
    assert torch.allclose(project(found, x, threat, scale), found, rtol=0.0, atol=ROUNDING)


@given(images(), threats(), st.integers(0, 2**32))
def test_what_is_inside_already_is_not_moved(x: Tensor, threat: Threat, seed: int) -> None:
    """A point of ball and box is its own projection."""
    inside = random_start(x, threat, torch.Generator().manual_seed(seed), 0.99)
    assert torch.allclose(project(inside, x, threat), inside, rtol=0.0, atol=ROUNDING)


@given(images(), threats(), st.integers(0, 2**32), st.floats(0.01, 1.0))
def test_a_random_start_is_inside_ball_and_box(x: Tensor, threat: Threat, seed: int, scale: float) -> None:
    """Every start is a valid image within ε·scale of its own."""
    found = random_start(x, threat, torch.Generator().manual_seed(seed), scale)
    assert float(_length(found - x, threat.norm).max()) <= scale * float(threat.epsilon) + ROUNDING
    assert float(found.min()) >= 0.0
    assert float(found.max()) <= 1.0


@given(images(), threats(), st.integers(0, 2**32))
def test_a_linf_projection_is_the_nearest_point(x: Tensor, threat: Threat, seed: int) -> None:
    """No other point of ball and box is nearer to what was projected, pixel by pixel."""
    linf = Threat("linf", min(threat.epsilon, Fraction(1)))
    generator = torch.Generator().manual_seed(seed)
    perturbed = x + torch.randn(x.shape, generator=generator)
    found, other = project(perturbed, x, linf), random_start(x, linf, generator)
    assert bool(((found - perturbed).abs() <= (other - perturbed).abs() + ROUNDING).all())
