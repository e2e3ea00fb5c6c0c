"""From the configuration to what updates weights: optimizer, schedule, gradient clipping, weight averaging."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from proxyrob.config.optimizer import (
    AdamWOptimizer,
    CosineSchedule,
    Decayed,
    OneCycleSchedule,
    PiecewiseSchedule,
    SgdOptimizer,
)
from proxyrob.config.train import TrainConfig
from proxyrob.schedule import average_with_warmup, cosine_with_warmup, one_cycle, piecewise

NORMALISATION = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def build_optimizer(config: TrainConfig, model: nn.Module) -> tuple[Optimizer, LRScheduler]:
    """The optimizer of a model's parameters and the schedule of its learning rate, which takes one step per step."""
    groups = _groups(model, config.optimizer.decayed, config.weight_decay)
    match config.optimizer:
        case AdamWOptimizer():
            optimizer: Optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        case SgdOptimizer(momentum=momentum, nesterov=nesterov):
            optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=momentum, nesterov=nesterov, fused=True)
    match config.schedule:
        case CosineSchedule(warmup_share=share, final_factor=final):
            return optimizer, cosine_with_warmup(optimizer, config.steps, share, final)
        case OneCycleSchedule(warmup_share=share, initial_factor=initial, final_factor=final, cycles_momentum=cycles):
            return optimizer, one_cycle(
                optimizer, config.steps, warmup_share=share, initial_factor=initial, final_factor=final, cycles_momentum=cycles
            )
        case PiecewiseSchedule(milestones=milestones, factor=factor):
            return optimizer, piecewise(optimizer, config.steps, milestones, factor)


def build_average(config: TrainConfig, model: nn.Module) -> AveragedModel:
    """The exponential average of a model's weights; its running statistics are the model's own."""
    delay = round(config.ema_warmup * config.steps)
    return AveragedModel(model, multi_avg_fn=average_with_warmup(config.ema_decay, delay))


def clip_gradients(config: TrainConfig, model: nn.Module) -> None:
    """Shorten the gradient of all weights together to ``max_gradient_norm``, where one is set."""
    if config.max_gradient_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)


def _groups(model: nn.Module, decayed: Decayed, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that the weight decay shrinks and, where there are any, those it spares."""
    spared = set() if decayed == "all" else set(_spared(model, decayed))
    shrunk = [parameter for parameter in model.parameters() if parameter not in spared]
    groups: list[dict[str, Any]] = [{"params": shrunk, "weight_decay": weight_decay}]
    if spared:
        kept = [parameter for parameter in model.parameters() if parameter in spared]
        groups.append({"params": kept, "weight_decay": 0.0})
    return groups


def _spared(model: nn.Module, decayed: Decayed) -> Iterator[nn.Parameter]:
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, NORMALISATION) or (decayed == "weights" and parameter.ndim < 2):
                yield parameter
