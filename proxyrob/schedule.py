"""Schedules of the learning rate and of weight averaging."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import PARAM_LIST


def cosine_with_warmup(optimizer: Optimizer, steps: int, warmup_share: float = 1 / 30) -> LambdaLR:
    """Linear growth over the first ``warmup_share`` of the steps, then half a cosine to 0 (Loshchilov & Hutter 2017)."""
    warmup = max(1, round(warmup_share * steps))

    def factor(step: int) -> float:
        growth = min(1.0, (step + 1) / warmup)
        return growth * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps)))

    return LambdaLR(optimizer, factor)


def average_with_warmup(decay: float) -> Callable[[PARAM_LIST, PARAM_LIST, Tensor | int], None]:
    """Exponential averaging for torch's ``AveragedModel``, with decay min(decay, (1+t)/(10+t)) at update t.

    The warm-up keeps the first weights, which are hardly trained, from lasting in the average of a short training.
    """

    def update(averages: PARAM_LIST, weights: PARAM_LIST, updates: Tensor | int) -> None:
        t = int(updates)
        share = 1.0 - min(decay, (1.0 + t) / (10.0 + t))
        torch._foreach_lerp_(averages, weights, share)  # pyright: ignore[reportPrivateImportUsage]  (what torch itself uses)

    return update
