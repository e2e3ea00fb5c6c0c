"""A copy of a model for attacks and certificates: frozen, in eval mode, without the work that they have no need of."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode, has_torch_function_unary
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from proxyrob.device import eval_mode
from proxyrob.models.packed import PackedConv2d

TOLERANCE = 1e-3
"""By which share of the largest logit a folded model may differ from the model; rounding is a thousand times smaller."""

VALUES_AT_ONCE = 64 * 3072
"""On the CPU more images are read piece by piece: what layers leave for the next one then stays in the caches."""

Pair = tuple[str, str]
"""The names of a convolution and of the batch normalisation that follows it."""


class FoldedCopy(nn.Module):
    """What ``model`` computes in eval mode, to rounding, with each batch normalisation made part of the convolution before it.

    Which belong together is found by watching ``model`` read ``example``, and is proved on it: where the logits would not
    be the same, nothing is folded. Tensors are in the channels_last layout, on the CPU weights are rearranged once and not at
    every reading, and no gradient with respect to a weight is ever computed. With a ``dtype`` of less precision,
    convolutions, linear and normalisation layers compute in it; images are taken and logits given in float32 either way.

    The copy does not follow the model: ``refresh`` takes over its weights and running statistics as they are by then.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32, *, example: Float[Tensor, "b c h w"]) -> None:
        super().__init__()
        self._original = (model,)  # a tuple hides it from the list of this module's own parts
        with torch.no_grad(), eval_mode(model):
            expected = model(example)
            pairs = _find_pairs(model, example)
        self.network = _fold(model, pairs)
        self.pairs = pairs
        self.refresh()
        with torch.no_grad():
            found = self.network(example)
        if not bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max()):
            self.network, self.pairs = _fold(model, ()), ()
        self.dtype = dtype
        _pack(self.network, dtype)
        self.requires_grad_(False)
        self.eval()
        for module in self.network.modules():
            if isinstance(module, _ConvNd | nn.Linear | _BatchNorm):
                module.to(dtype)
                if dtype != torch.float32:
                    module.register_forward_pre_hook(_cast_input)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (its stubs lack this overload)
        self.refresh()

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        images = images.contiguous(memory_format=torch.channels_last)
        size = max(VALUES_AT_ONCE // images.shape[1:].numel(), 1)
        is_followed = has_torch_function_unary(images)  # by somebody who has to see all images together
        if len(images) <= size or images.device.type != "cpu" or is_followed:
            return self.network(images).float()
        return torch.cat([self.network(piece) for piece in images.split(size)]).float()

    def train(self, mode: bool = True) -> "FoldedCopy":
        """Stays in eval mode: there is nothing in it to train."""
        return super().train(False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's weights and running statistics."""
        (model,) = self._original
        now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        folded = {conv for conv, _ in self.pairs}
        for name, module in self.network.named_modules():
            if name in folded:
                continue
            for kept, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                tensor.copy_(now[f"{name}.{kept}" if name else kept])
        for conv_name, norm_name in self.pairs:
            conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
            assert isinstance(conv, _ConvNd)
            assert isinstance(norm, _BatchNorm)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            target = self.network.get_submodule(conv_name)
            assert isinstance(target, _ConvNd)
            assert target.bias is not None
            target.weight.copy_(weight)
            target.bias.copy_(bias)
        for module in self.network.modules():
            if isinstance(module, PackedConv2d):
                module.unpack()


def _find_pairs(model: nn.Module, example: Tensor) -> tuple[Pair, ...]:
    """The convolutions whose output a batch normalisation reads and nothing else does, each of the two called once."""
    made: dict[int, str] = {}
    calls: Counter[str] = Counter()
    found: list[tuple[Pair, Tensor]] = []
    kept_alive: list[Tensor] = []  # else two outputs could have one identity
    readers = _Readers()
    hooks: list[RemovableHandle] = []

    def watch(name: str, module: nn.Module) -> None:
        def see(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] += 1
            if isinstance(module, _ConvNd):
                made[id(output)] = name
                readers.counts[id(output)] = 0  # whatever had this identity before is gone
                kept_alive.append(output)
            elif id(given[0]) in made:
                found.append(((made[id(given[0])], name), given[0]))

        hooks.append(module.register_forward_hook(see))

    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) or (isinstance(module, _BatchNorm) and module.running_mean is not None):
            watch(name, module)
    try:
        with readers:
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(
        (conv, norm) for (conv, norm), output in found if calls[conv] == calls[norm] == readers.counts[id(output)] == 1
    )


class _Readers(TorchFunctionMode):
    """Counts how many operations that give a tensor read each tensor, while the block runs. Tensors must be kept alive."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self.counts[id(leaf)] += 1
        return result


def _fold(model: nn.Module, pairs: tuple[Pair, ...]) -> nn.Module:
    """A copy in eval mode whose convolutions have a bias in place of the normalisation after them; weights to be refreshed."""
    copy = deepcopy(model).eval()
    for conv_name, norm_name in pairs:
        conv = copy.get_submodule(conv_name)
        assert isinstance(conv, _ConvNd)
        if conv.bias is None:
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
        parent, _, name = norm_name.rpartition(".")
        setattr(copy.get_submodule(parent), name, nn.Identity())
    return copy


def _pack(network: nn.Module, dtype: torch.dtype) -> None:
    """Put convolutions in place that need not rearrange their weights at every call."""
    for name, module in list(network.named_modules()):
        if name and PackedConv2d.can_replace(module, dtype):
            assert isinstance(module, nn.Conv2d)
            parent, _, own_name = name.rpartition(".")
            setattr(network.get_submodule(parent), own_name, PackedConv2d(module))


def _cast_input(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give a layer its input in the precision of its weights."""
    dtype = next(module.parameters()).dtype
    return tuple(tensor.to(dtype) for tensor in given)
