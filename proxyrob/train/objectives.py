"""What training minimises: natural, PGD adversarial training, TRADES, and the stability loss for smoothing."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks import attack_pgd
from proxyrob.config.train import NaturalObjective, PgdObjective, RobustObjective, StabilityObjective, TradesObjective
from proxyrob.device import eval_mode
from proxyrob.threat import Threat

TRADES_START = 0.001
"""Standard deviation of the noise TRADES' attack starts from, as in the authors' description."""


@dataclass(frozen=True)
class LossParts:
    """One loss per image, and the logits training accuracy is counted on (those of the perturbed images)."""

    losses: Float[Tensor, " b"]
    logits: Float[Tensor, "b k"]


def compute_losses(
    objective: RobustObjective | StabilityObjective,
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    labels: Int64[Tensor, " b"],
    *,
    threat: Threat | None,
    scale: float,
    generator: torch.Generator,
) -> LossParts:
    """The loss of each image under ``objective``; ``scale`` in [0,1] shrinks the perturbation during warm-up.

    The attack inside reads the model in eval mode; the loss itself leaves the mode as the caller set it.

    Randomness: the attack's start, or the noise of the stability loss, from ``generator``. Raises ``ValueError`` when an
    adversarial objective is given no threat model.
    """
    match objective:
        case NaturalObjective():
            logits = model(images)
            return LossParts(F.cross_entropy(logits, labels, reduction="none"), logits)
        case PgdObjective():
            perturbed = attack_pgd(
                model,
                images,
                lambda logits: F.cross_entropy(logits, labels, reduction="sum"),
                _required(threat),
                steps=objective.attack_steps,
                relative_step=objective.relative_step,
                generator=generator,
                scale=scale,
            )
            logits = model(perturbed)
            return LossParts(F.cross_entropy(logits, labels, reduction="none"), logits)
        case TradesObjective():
            return _trades(objective, model, images, labels, _required(threat), scale, generator)
        case StabilityObjective():
            noise = torch.randn(images.shape, generator=generator, device=images.device)
            clean = model(images)
            noisy = model(images + scale * objective.sigma * noise)
            losses = F.cross_entropy(clean, labels, reduction="none") + objective.beta * divergence(clean, noisy)
            return LossParts(losses, noisy)


def divergence(reference: Float[Tensor, "b k"], other: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """KL(softmax(reference) ‖ softmax(other)) of each image, with gradients through both."""
    log_reference, log_other = F.log_softmax(reference, dim=1), F.log_softmax(other, dim=1)
    return (log_reference.exp() * (log_reference - log_other)).sum(dim=1)


def _trades(
    objective: TradesObjective,
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    labels: Int64[Tensor, " b"],
    threat: Threat,
    scale: float,
    generator: torch.Generator,
) -> LossParts:
    with torch.no_grad(), eval_mode(model):
        reference = model(images)
    start = images + TRADES_START * torch.randn(images.shape, generator=generator, device=images.device)
    perturbed = attack_pgd(
        model,
        images,
        lambda logits: divergence(reference, logits).sum(),
        threat,
        steps=objective.attack_steps,
        relative_step=objective.relative_step,
        generator=generator,
        scale=scale,
        start=start,
    )
    clean, attacked = model(images), model(perturbed)
    losses = F.cross_entropy(clean, labels, reduction="none") + objective.beta * divergence(clean, attacked)
    return LossParts(losses, attacked)


def _required(threat: Threat | None) -> Threat:
    if threat is None:
        raise ValueError("expected a threat model for an adversarial objective, got None")
    return threat
