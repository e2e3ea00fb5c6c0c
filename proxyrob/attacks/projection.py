"""Projection onto a threat model's ball and onto valid images."""

import torch
from jaxtyping import Float
from torch import Tensor

from proxyrob.rng import AnyGenerator, draw
from proxyrob.threat import Threat


def project(
    perturbed: Float[Tensor, "b c h w"], images: Float[Tensor, "b c h w"], threat: Threat, scale: float = 1.0
) -> Float[Tensor, "b c h w"]:
    """The point of ball ∩ [0,1] that an attack goes on from.

    ``scale`` shrinks the ball, as during warm-up. L∞ is the exact projection. For L2 the perturbation is scaled onto the
    ball and then clipped to [0,1], which keeps it inside both, though it is not the nearest such point.
    """
    epsilon = scale * float(threat.epsilon)
    if threat.norm == "linf":
        return torch.min(torch.max(perturbed, images - epsilon), images + epsilon).clamp_(0.0, 1.0)
    delta = perturbed - images
    lengths = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
    return (images + delta * (epsilon / lengths).clamp_max(1.0).view(-1, 1, 1, 1)).clamp_(0.0, 1.0)


def random_start(
    images: Float[Tensor, "b c h w"], threat: Threat, generator: AnyGenerator, scale: float = 1.0
) -> Float[Tensor, "b c h w"]:
    """A uniform point of the ball around each image, clipped to [0,1]."""
    epsilon, shape = scale * float(threat.epsilon), tuple(images.shape)
    if threat.norm == "linf":
        delta = draw(shape, images, generator, lambda whole, of: whole.uniform_(-epsilon, epsilon, generator=of))
    else:
        delta = draw(shape, images, generator, lambda whole, of: whole.normal_(generator=of))
        quantile = draw(shape[:1], images, generator, lambda whole, of: whole.uniform_(generator=of))
        radius = quantile ** (1.0 / images[0].numel())
        delta *= (epsilon * radius / delta.flatten(1).norm(dim=1).clamp_min(1e-12)).view(-1, 1, 1, 1)
    return (images + delta).clamp_(0.0, 1.0)


def ascend(
    perturbed: Float[Tensor, "b c h w"], gradient: Float[Tensor, "b c h w"], threat: Threat, step_size: float
) -> Float[Tensor, "b c h w"]:
    """One step of length ``step_size`` in the norm's steepest direction (sign of the gradient, or the unit gradient)."""
    if threat.norm == "linf":
        return perturbed + step_size * gradient.sign()
    lengths = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
    return perturbed + gradient * (step_size / lengths).view(-1, 1, 1, 1)
