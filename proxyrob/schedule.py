"""Learning-rate schedules."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine_with_warmup(optimizer: Optimizer, steps: int, warmup_share: float = 1 / 30) -> LambdaLR:
    """Linear growth over the first ``warmup_share`` of the steps, then half a cosine to 0 (Loshchilov & Hutter 2017)."""
    warmup = max(1, round(warmup_share * steps))

    def factor(step: int) -> float:
        growth = min(1.0, (step + 1) / warmup)
        return growth * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps)))

    return LambdaLR(optimizer, factor)
