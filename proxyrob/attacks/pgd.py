"""Projected gradient descent (Madry et al. 2018), as a plain function."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proxyrob.attacks.projection import ascend, project, random_start
from proxyrob.device import BatchNormMode, attack_mode, frozen
from proxyrob.rng import AnyGenerator
from proxyrob.threat import Threat


def attack_pgd(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    loss: Callable[[Float[Tensor, "b k"]], Float[Tensor, ""]],
    threat: Threat,
    *,
    steps: int,
    relative_step: float,
    generator: AnyGenerator,
    scale: float = 1.0,
    start: Float[Tensor, "b c h w"] | None = None,
    batchnorm: BatchNormMode = "eval",
) -> Float[Tensor, "b c h w"]:
    """Images inside the threat model that raise ``loss`` of the logits, found in ``steps`` gradient steps.

    Each step has length ``relative_step`` · epsilon. ``scale`` shrinks the threat model, as during warm-up. The attack
    starts from a uniform point of the ball unless ``start`` is given. The model is read in eval mode, its batch
    normalisation as ``batchnorm`` says, and its weight gradients are not computed; all is restored. No weight changes and
    no running statistic moves.

    Randomness: the starting point, from ``generator``.
    """
    step_size = relative_step * scale * float(threat.epsilon)
    perturbed = random_start(images, threat, generator, scale) if start is None else start
    with attack_mode(model, batchnorm), frozen(model):
        for _ in range(steps):
            perturbed = perturbed.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(model(perturbed)), perturbed)
            with torch.no_grad():
                perturbed = project(ascend(perturbed, gradient, threat, step_size), images, threat, scale)
    return perturbed.detach()
