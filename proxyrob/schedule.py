"""Schedules of the learning rate and of weight averaging."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.optim.swa_utils import PARAM_LIST


def cosine_with_warmup(optimizer: Optimizer, steps: int, warmup_share: float = 1 / 30, final_factor: float = 0.0) -> LambdaLR:
    """Linear growth over the first ``warmup_share`` of the steps, then half a cosine (Loshchilov & Hutter 2017).

    It ends at ``final_factor`` times the optimizer's rate.
    """
    warmup = max(1, round(warmup_share * steps))

    def factor(step: int) -> float:
        growth = min(1.0, (step + 1) / warmup)
        return growth * (final_factor + (1.0 - final_factor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps))))

    return LambdaLR(optimizer, factor)


def one_cycle(
    optimizer: Optimizer,
    steps: int,
    *,
    warmup_share: float,
    initial_factor: float,
    final_factor: float,
    cycles_momentum: bool,
) -> OneCycleLR:
    """Half a cosine up from ``initial_factor`` times the optimizer's rate, and another down to ``final_factor`` times.

    That is Smith & Topin 2018 in the two phases of torch's ``OneCycleLR``. With ``cycles_momentum`` the momentum, or
    AdamW's first beta, falls from 0.95 to 0.85 while the rate grows, and rises again.
    """
    if warmup_share * steps == 1.0:  # torch would divide by the length of a growth that is over at the first step
        warmup_share *= 1.0 - 1e-9
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=steps,
        pct_start=warmup_share,
        cycle_momentum=cycles_momentum,
        base_momentum=0.85,
        max_momentum=0.95,
        div_factor=1.0 / initial_factor,
        final_div_factor=initial_factor / final_factor,
    )


def piecewise(optimizer: Optimizer, steps: int, milestones: Sequence[float], factor: float) -> LambdaLR:
    """The rate is multiplied by ``factor`` at each milestone, which are shares of the steps."""
    drops = [round(milestone * steps) for milestone in milestones]
    return LambdaLR(optimizer, lambda step: factor ** sum(step >= drop for drop in drops))


def average_with_warmup(decay: float, delay: int = 0) -> Callable[[PARAM_LIST, PARAM_LIST, Tensor | int], None]:
    """Exponential averaging for torch's ``AveragedModel``, with decay min(decay, (1+t)/(10+t)) at update ``delay`` + t.

    The warm-up keeps the first weights, which are hardly trained, from lasting in the average of a short training. Before
    update ``delay`` the average is the weights themselves (Gowal et al. 2020).
    """

    def update(averages: PARAM_LIST, weights: PARAM_LIST, updates: Tensor | int) -> None:
        t = int(updates) - delay
        share = 1.0 - min(decay, (1.0 + t) / (10.0 + t)) if t >= 0 else 1.0
        torch._foreach_lerp_(averages, weights, share)  # pyright: ignore[reportPrivateImportUsage]  (what torch itself uses)

    return update
