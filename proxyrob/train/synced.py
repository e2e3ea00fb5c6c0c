"""Batch normalisation over the images of all processes."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from proxyrob.device import has_batchnorm
from proxyrob.train.processes import Processes


class SyncedBatchNorm(_BatchNorm):
    """Batch normalisation that in train mode divides by the statistics of the images of all processes together.

    Each process sends mean and variance of its images as sums over them, in float64, where the difference of the two sums
    that the variance is made of loses nothing. In eval mode it is plain batch normalisation.

    It is ours on every device, although torch's ``SyncBatchNorm`` has faster kernels for GPUs, because that one refuses to
    work on a CPU: what trains on GPUs is what can be tested without one. Attacks, where most of the time goes, read running
    statistics, or the folded copy that has none.
    """

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:  # noqa: A002  (torch's own name)
        if not self.training:
            return super().forward(input)
        images = input.float()
        variance, mean = torch.var_mean(images, (0, 2, 3), correction=0)
        variance, mean = variance.double(), mean.double()
        own_count = input.numel() // input.shape[1]
        own_sums = own_count * torch.stack([mean, variance + mean.square(), torch.ones_like(mean)])
        sums: Tensor = _Sum.apply(own_sums)
        count = sums[2].detach()
        mean, square = sums[0] / count, sums[1] / count
        variance = (square - mean.square()).clamp_min(0.0)
        if self.track_running_stats:
            self._track(mean.detach(), (variance * count / (count - 1.0)).detach())
        scale = self.weight.double() * (variance + self.eps).rsqrt()
        offset = self.bias.double() - mean * scale
        return torch.addcmul(_per_channel(offset), images, _per_channel(scale)).to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  (torch's own name)
        if input.dim() != 4:
            raise ValueError(f"expected images of 4 dimensions, got {input.dim()}")

    def _track(self, mean: Float[Tensor, " c"], unbiased_variance: Float[Tensor, " c"]) -> None:
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.float(), self.momentum)
        self.running_var.lerp_(unbiased_variance.float(), self.momentum)


def synchronise_batchnorm(model: nn.Module, processes: Processes) -> None:
    """Replace the fresh batch normalisation layers of ``model`` by ``SyncedBatchNorm``, where there are several processes.

    Names in the state of ``model`` stay. Raises ``ValueError`` when it has no such layer.
    """
    if not has_batchnorm(model):
        raise ValueError("sync_batchnorm has no effect on a model without batch normalisation; leave it out")
    if processes.count == 1:
        return
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, SyncedBatchNorm(layer.num_features, layer.eps, layer.momentum))


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def _per_channel(values: Float[Tensor, " c"]) -> Float[Tensor, "1 c 1 1"]:
    return values.float().view(1, -1, 1, 1)
