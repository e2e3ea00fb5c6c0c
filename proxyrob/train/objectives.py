"""What training minimises: a perturbed batch for each objective, and the loss on it.

The two are apart because adversarial weight perturbation takes the loss of one batch twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks import attack_pgd
from proxyrob.config.objective import (
    GaussianObjective,
    MartObjective,
    NaturalObjective,
    PgdObjective,
    SmoothAdvObjective,
    StabilityObjective,
    TradesObjective,
)
from proxyrob.config.train import RobustObjective, SmoothObjective
from proxyrob.device import attack_mode
from proxyrob.rng import AnyGenerator
from proxyrob.threat import Threat
from proxyrob.train.smoothing import attack_smoothed, average_predictions, draw_noise

START_NOISE = 0.001
"""Standard deviation of the noise that the attacks of TRADES and MART start from, as in the authors' descriptions."""

Labels = Int64[Tensor, " b"] | Float[Tensor, "b k"]
"""Classes, or the share of each class in an image that is mixed of two."""


@dataclass(frozen=True)
class PerturbedBatch:
    """What a loss is taken on: the images, the same perturbed (``n`` = ``b``, or several noisy ones of each in turn)."""

    images: Float[Tensor, "b c h w"]
    perturbed: Float[Tensor, "n c h w"]
    labels: Labels

    def part(self, rows: slice) -> "PerturbedBatch":
        """The batch of some of the images."""
        copies = len(self.perturbed) // len(self.images)
        perturbed = self.perturbed[rows.start * copies : rows.stop * copies]
        return PerturbedBatch(self.images[rows], perturbed, self.labels[rows])


@dataclass(frozen=True)
class LossParts:
    """One loss per image, and the logits training accuracy is counted on (those of the perturbed images)."""

    losses: Float[Tensor, " b"]
    logits: Float[Tensor, "b k"]


def join_batches(batches: Sequence[PerturbedBatch]) -> PerturbedBatch:
    """One batch of several parts."""
    if len(batches) == 1:
        return batches[0]
    return PerturbedBatch(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.perturbed for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
    )


def perturb_images(
    objective: RobustObjective | SmoothObjective,
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    labels: Labels,
    *,
    threat: Threat | None,
    scale: float,
    generator: AnyGenerator,
) -> PerturbedBatch:
    """Attack the images, or add noise, as ``objective`` says.

    ``scale`` in [0,1] shrinks the perturbation during warm-up; with SmoothAdv, which has a threat model of its own, the
    attack but not the noise. Attacks maximise the cross-entropy of the labels as they are, without label smoothing.

    No weight, running statistic or mode of ``model`` changes.

    Differs from the source: Carmon et al. 2019, from whom the stability loss for smoothing is, clip the noisy images to [0,1].
    Here they are not clipped, as those that are certified are not. In L2 the perturbation is first scaled onto the ball and
    then clipped; Zhang et al. and Salman et al. clip first.

    Randomness: the attack's start, or the noise, from ``generator``. Raises ``ValueError`` when an adversarial objective
    is given no threat model.
    """
    match objective:
        case NaturalObjective():
            perturbed = images
        case PgdObjective() | MartObjective():
            perturbed = _attack(objective, model, images, _CrossEntropy(labels), threat, scale, generator)
        case TradesObjective():
            with torch.no_grad(), attack_mode(model, objective.attack_batchnorm):
                reference = model(images)
            perturbed = _attack(objective, model, images, _Divergence(reference), threat, scale, generator)
        case StabilityObjective() | GaussianObjective():
            perturbed = images + scale * objective.sigma * draw_noise(images, generator)
        case SmoothAdvObjective():
            perturbed = attack_smoothed(objective, model, images, _CrossEntropy(labels), scale, generator)
    return PerturbedBatch(images, perturbed, labels)


def losses_on(objective: RobustObjective | SmoothObjective, model: nn.Module, batch: PerturbedBatch) -> LossParts:
    """The loss of each image of a perturbed batch; ``model`` is read in the mode it is in."""
    images, perturbed, labels = batch.images, batch.perturbed, batch.labels
    match objective:
        case NaturalObjective() | PgdObjective() | GaussianObjective():
            logits = model(perturbed)
            return LossParts(_cross_entropies(logits, labels, objective.label_smoothing), logits)
        case TradesObjective() | StabilityObjective():
            clean, logits = model(images), model(perturbed)
            natural = _cross_entropies(clean, labels, objective.label_smoothing)
            return LossParts(natural + objective.beta * divergence(clean, logits), logits)
        case MartObjective():
            clean, logits = model(images), model(perturbed)
            return LossParts(mart_losses(clean, logits, labels, objective.beta), logits)
        case SmoothAdvObjective():
            each = model(perturbed)
            repeated = labels.repeat_interleave(objective.num_noise, dim=0)
            losses = _cross_entropies(each, repeated, objective.label_smoothing)
            return LossParts(losses.view(len(images), -1).mean(dim=1), average_predictions(each, len(images)))


def divergence(reference: Float[Tensor, "b k"], other: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """KL(softmax(reference) ‖ softmax(other)) of each image, with gradients through both."""
    log_reference, log_other = F.log_softmax(reference, dim=1), F.log_softmax(other, dim=1)
    return (log_reference.exp() * (log_reference - log_other)).sum(dim=1)


def mart_losses(
    clean: Float[Tensor, "b k"], attacked: Float[Tensor, "b k"], labels: Labels, beta: float
) -> Float[Tensor, " b"]:
    """BCE(p', y) + beta · KL(p ‖ p') · (1 - p_y), with BCE = -log p'_y - log(1 - max over k≠y of p'_k).

    Wang et al. 2020; p are the probabilities of the image and p' those of the attacked one.

    Differs from the source: soft labels are allowed, and give the mean over the classes of the loss of each, as CutMix
    defines its loss. The authors' program adds 1e-4 inside the second logarithm, which bounds it at 9.2 and takes its
    gradient from the images that are most wrong; here it is computed without cancellation and needs no bound.
    """
    shares = labels if labels.is_floating_point() else F.one_hot(labels, clean.shape[1]).to(clean.dtype)
    log_attacked = F.log_softmax(attacked, dim=1)
    largest, places = log_attacked.topk(2, dim=1)
    without_first = log_attacked.scatter(1, places[:, :1], -torch.inf).logsumexp(dim=1)
    without_second = torch.log1p(-largest[:, 1].exp())  # at most a half, so that nothing cancels
    share_of_first = shares.gather(1, places[:, :1]).squeeze(1)
    margin = -share_of_first * without_second - (1.0 - share_of_first) * without_first
    boosted = -(shares * log_attacked).sum(dim=1) + margin
    return boosted + beta * divergence(clean, attacked) * (1.0 - (shares * F.softmax(clean, dim=1)).sum(dim=1))


@dataclass(frozen=True)
class _CrossEntropy:
    """What most attacks maximise."""

    labels: Labels

    def __call__(self, logits: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
        return F.cross_entropy(logits, self.labels, reduction="sum")


@dataclass(frozen=True)
class _Divergence:
    """What the attack of TRADES maximises."""

    reference: Float[Tensor, "b k"]

    def __call__(self, logits: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
        return divergence(self.reference, logits).sum()


def _attack(
    objective: PgdObjective | TradesObjective | MartObjective,
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    loss: _CrossEntropy | _Divergence,
    threat: Threat | None,
    scale: float,
    generator: AnyGenerator,
) -> Float[Tensor, "b c h w"]:
    if threat is None:
        raise ValueError("expected a threat model for an adversarial objective, got None")
    return attack_pgd(
        model,
        images,
        loss,
        threat,
        steps=objective.attack_steps,
        relative_step=objective.relative_step,
        generator=generator,
        scale=scale,
        start=None if objective.attack_start == "uniform" else images + START_NOISE * draw_noise(images, generator),
        batchnorm=objective.attack_batchnorm,
    )


def _cross_entropies(logits: Float[Tensor, "n k"], labels: Tensor, label_smoothing: float) -> Float[Tensor, " n"]:
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
