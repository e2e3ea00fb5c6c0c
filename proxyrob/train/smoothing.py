"""Training for randomized smoothing: noise, and attacks on the smoothed classifier."""

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks import attack_pgd
from proxyrob.config.objective import SmoothAdvObjective
from proxyrob.rng import AnyGenerator, draw


def draw_noise(images: Float[Tensor, "b c h w"], generator: AnyGenerator, count: int = 1) -> Float[Tensor, "n c h w"]:
    """Standard normal noise, ``count`` samples of each image in turn; from ``generator``."""
    shape = (len(images), count, *images.shape[1:])
    return draw(shape, images, generator, lambda whole, of: whole.normal_(generator=of)).flatten(0, 1)


def average_predictions(logits: Float[Tensor, "n k"], num_images: int) -> Float[Tensor, "b k"]:
    """The log of the probabilities that the noisy copies of each image, which lie in turn, have on average."""
    each = F.log_softmax(logits, dim=1).view(num_images, -1, logits.shape[1])
    return each.logsumexp(dim=1) - math.log(each.shape[1])


def attack_smoothed(
    objective: SmoothAdvObjective,
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    loss: Callable[[Float[Tensor, "b k"]], Float[Tensor, ""]],
    scale: float,
    generator: AnyGenerator,
) -> Float[Tensor, "n c h w"]:
    """Noisy copies of images on which the smoothed classifier is attacked, ``num_noise`` of each image in turn.

    The attack starts from the images and maximises the loss of the average prediction under noise that is drawn once and is
    that of the copies too (Salman et al. 2019, the variant with PGD). ``scale`` shrinks the threat model and not the noise.

    Differs from the source: all copies are in one step of the optimizer, where the authors take as many steps, each with a
    part of the batch.

    Randomness: the noise, from ``generator``.
    """
    noise = objective.sigma * draw_noise(images, generator, objective.num_noise)
    attacked = attack_pgd(
        Smoothed(model, noise),
        images,
        loss,
        objective.threat,
        steps=objective.attack_steps,
        relative_step=objective.relative_step,
        generator=generator,
        scale=scale,
        start=images,
        batchnorm=objective.attack_batchnorm,
    )
    return attacked.repeat_interleave(objective.num_noise, dim=0) + noise


class Smoothed(nn.Module):
    """A classifier's average prediction under given noise."""

    def __init__(self, model: nn.Module, noise: Float[Tensor, "n c h w"]) -> None:
        super().__init__()
        self.model, self.noise = model, noise

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        copies = images.repeat_interleave(len(self.noise) // len(images), dim=0)
        return average_predictions(self.model(copies + self.noise), len(images))
