"""Adversarial weight perturbation (Wu et al. 2020)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proxyrob.config.objective import AwpConfig
from proxyrob.device import untracked

SMALLEST_NORM = 1e-20


def awp_gamma(awp: AwpConfig | None, step: int, steps: int) -> float:
    """How far weights are perturbed in a step: 0 where they are not, or not yet."""
    return awp.gamma if awp is not None and step >= round(awp.warmup * steps) else 0.0


@contextmanager
def perturbed_weights(
    model: nn.Module,
    gamma: float,
    losses: Callable[[], Iterable[Float[Tensor, ""]]],
    average: Callable[[Sequence[Tensor]], None] | None = None,
) -> Iterator[None]:
    """Move the weights to where the sum of ``losses`` is larger, for the time of the block, and put the same bits back.

    Each weight tensor w moves by gamma · ‖w‖ along the gradient of that sum, in one step: every tensor of more than one
    dimension that is called ``weight``, so neither biases nor normalisation layers. Nothing happens where gamma is 0.
    ``losses`` are those of the parts of the perturbed batch that the block trains on, made one after the other; they are
    taken with the mode that the model is in, while no running statistic moves, and leave no gradients behind. ``average``
    averages the gradients in place over the processes that share a batch.

    Differs from the source: the weights are restored before the optimizer's step and not after it, so that they are restored
    exactly, and weight decay shrinks the weights themselves. The gradient is the same.
    """
    if gamma == 0.0:
        yield
        return
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] == "weight" and parameter.ndim > 1 and parameter.requires_grad
    ]
    gradients = [torch.zeros_like(weight) for weight in weights]
    with untracked(model):
        for loss in losses():
            torch._foreach_add_(gradients, torch.autograd.grad(loss, weights, materialize_grads=True))  # pyright: ignore[reportPrivateImportUsage]  (what torch's optimizers use)
    if average is not None:
        average(gradients)
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(gradient * (gamma * weight.norm() / gradient.norm().clamp_min(SMALLEST_NORM)))
        del gradients
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
