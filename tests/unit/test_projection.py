"""Projection, random starts and steps, on numbers that can be checked by hand."""

import pytest
import torch
from torch import Tensor

from proxyrob.attacks import project, random_start
from proxyrob.attacks.projection import ascend
from proxyrob.threat import Threat, parse_threat

LINF, L2 = parse_threat("linf:0.25"), parse_threat("l2:1/2")


def _image(*pixels: float) -> Tensor:
    return torch.tensor(pixels).view(1, 1, 1, -1)


def test_linf_clamps_every_pixel_to_the_ball_and_the_box() -> None:
    """A pixel inside stays, one outside goes to the nearest border of [x-ε, x+ε] ∩ [0,1]."""
    found = project(_image(0.4, 0.9, 0.2, 0.3, -1.0), _image(0.5, 0.5, 0.5, 0.1, 0.1), LINF)
    assert found.flatten().tolist() == pytest.approx([0.4, 0.75, 0.25, 0.3, 0.0])


def test_l2_scales_a_perturbation_onto_the_ball() -> None:
    """(0.6, 0.8) has length 1 and is halved; a shorter one is left as it is, and so is none at all."""
    origin = _image(0.25, 0.25)
    assert project(origin + _image(0.6, 0.8), origin, L2).flatten().tolist() == pytest.approx([0.55, 0.65])
    assert project(origin + _image(0.1, 0.2), origin, L2).flatten().tolist() == pytest.approx([0.35, 0.45])
    assert torch.equal(project(origin, origin, L2), origin)


def test_l2_is_measured_over_the_whole_image_and_per_image() -> None:
    """Channels, rows and columns count together; one image's length does not touch another's."""
    images = torch.full((2, 2, 2, 2), 0.5)
    perturbed = images + torch.stack([torch.full((2, 2, 2), 0.3), torch.full((2, 2, 2), 0.01)])
    found = project(perturbed, images, L2) - images
    assert found[0].norm().item() == pytest.approx(0.5)
    assert torch.allclose(found[1], torch.full((2, 2, 2), 0.01))


@pytest.mark.parametrize(("threat", "expected"), [(LINF, 0.6), (L2, 0.7)])
def test_scale_shrinks_the_ball(threat: Threat, expected: float) -> None:
    """During warm-up the ball has ``scale`` times its radius."""
    found = project(_image(1.0), _image(0.5), threat, scale=0.4)
    assert found.item() == pytest.approx(expected)


def test_projection_leaves_its_input_alone() -> None:
    """No image is changed in place."""
    perturbed, images = _image(2.0, -1.0), _image(0.5, 0.5)
    for threat in (LINF, L2):
        project(perturbed, images, threat)
    assert (perturbed.flatten().tolist(), images.flatten().tolist()) == ([2.0, -1.0], [0.5, 0.5])


def test_random_starts_fill_the_linf_ball_evenly() -> None:
    """Every pixel is uniform on [x-ε, x+ε]: the mean is x, the variance ε²/3, the extremes are nearly reached."""
    images = torch.full((200, 1, 10, 10), 0.5)
    delta = random_start(images, LINF, torch.Generator().manual_seed(0)) - images
    assert delta.mean().item() == pytest.approx(0.0, abs=0.005)
    assert delta.var().item() == pytest.approx(0.25**2 / 3, rel=0.03)
    assert 0.2499 < delta.abs().max().item() <= 0.25 + 1e-6


def test_random_starts_fill_the_l2_ball_evenly() -> None:
    """Uniform in the ball of d dimensions: the share of starts within half the radius is (1/2)^d."""
    images = torch.full((40_000, 1, 1, 3), 0.5)
    delta = (random_start(images, L2, torch.Generator().manual_seed(0)) - images).flatten(1)
    radius = delta.norm(dim=1)
    assert radius.max().item() <= 0.5 + 1e-6
    assert (radius <= 0.25).float().mean().item() == pytest.approx(1 / 8, abs=0.01)
    assert delta.mean(dim=0).tolist() == pytest.approx([0.0, 0.0, 0.0], abs=0.005)


@pytest.mark.parametrize("threat", [LINF, L2])
def test_random_starts_come_from_their_generator_and_scale(threat: Threat) -> None:
    """The same generator gives the same start, another another; half the scale gives half the perturbation."""
    images = torch.full((3, 1, 4, 4), 0.5)

    def start(seed: int, scale: float = 1.0) -> Tensor:
        return random_start(images, threat, torch.Generator().manual_seed(seed), scale)

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))
    assert torch.allclose(start(0, 0.5) - images, (start(0) - images) / 2, atol=1e-6)


def test_a_linf_step_goes_by_the_sign() -> None:
    """Every pixel moves by the whole step; where there is no gradient it stays."""
    found = ascend(_image(0.5, 0.5, 0.5), _image(3.0, -0.001, 0.0), LINF, 0.1)
    assert found.flatten().tolist() == pytest.approx([0.6, 0.4, 0.5])


def test_an_l2_step_has_the_steps_length() -> None:
    """The image moves by the step along the unit gradient, however long the gradient is, and not at all without one."""
    found = ascend(_image(0.5, 0.5), _image(30.0, 40.0), L2, 0.1)
    assert found.flatten().tolist() == pytest.approx([0.56, 0.58])
    assert ascend(_image(0.5, 0.5), _image(0.0, 0.0), L2, 0.1).flatten().tolist() == [0.5, 0.5]
