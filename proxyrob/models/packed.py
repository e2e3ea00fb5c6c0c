"""Convolutions whose weights lie in memory as the processor reads them.

oneDNN, which computes convolutions on the CPU, reads weights in blocks. torch hands them over as they are trained, and each
call rearranges them anew: a tenth of the time in which a ResNet-18 reads twenty images, more with fewer.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_unary

Pair = tuple[int, int]
ONE: Pair = (1, 1)


@dataclass(frozen=True)
class PackedWeights:
    """The weights of a convolution (not dilated, in one group) as they were trained, and rearranged.

    ``backwards`` are those of the convolution that gives the gradient with respect to the images; with a stride it is none,
    and they are ``None``.
    """

    weight: Float[Tensor, "d c i j"]
    bias: Float[Tensor, " d"] | None
    stride: Pair
    padding: Pair
    forwards: Tensor
    backwards: Tensor | None

    @staticmethod
    def of(conv: nn.Conv2d, images: Float[Tensor, "b c h w"]) -> "PackedWeights":
        """For images of about this shape: others are read as well, if not as fast."""
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        assert not isinstance(conv.padding, str)
        stride, padding = _pair(conv.stride), _pair(conv.padding)
        backwards = None
        if stride == ONE:
            turned = weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)
            given = [len(images), conv.out_channels, *images.shape[2:]]
            backwards = _rearrange(turned, ONE, _turned(weight, padding), given)
        forwards = _rearrange(weight, stride, padding, list(images.shape))
        return PackedWeights(weight, bias, stride, padding, forwards, backwards)

    def convolve(self, images: Float[Tensor, "b c h w"], padding: Pair) -> Float[Tensor, "b d i j"]:
        return _convolve(images, self.forwards, self.bias, self.stride, padding)

    def gradient(self, given: Float[Tensor, "b d i j"], shape: torch.Size) -> Float[Tensor, "b c h w"]:
        """With respect to images of this shape, of what has the gradient ``given`` with respect to the outputs."""
        given = given.contiguous(memory_format=torch.channels_last)
        if self.backwards is not None:
            return _convolve(given, self.backwards, None, ONE, _turned(self.weight, self.padding))
        images = torch.empty(shape, dtype=given.dtype, memory_format=torch.channels_last)  # of which only the shape is read
        wanted = [True, False, False]
        gradients = torch.ops.aten.convolution_backward(
            given, images, self.weight, None, self.stride, self.padding, ONE, False, [0, 0], 1, wanted
        )
        return gradients[0]


def convolve_packed(images: Float[Tensor, "b c h w"], weights: PackedWeights) -> Float[Tensor, "b d i j"]:
    """The convolution. A ``TorchFunctionMode`` sees the call, like one of torch's own functions."""
    if has_torch_function_unary(images):
        return handle_torch_function(convolve_packed, (images,), images, weights)
    if torch.is_grad_enabled() and images.requires_grad:
        return _Convolve.apply(images, weights)
    return weights.convolve(images, weights.padding)


class PackedConv2d(nn.Conv2d):
    """A convolution that shares the parameters of another; it has a gradient with respect to the images alone."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, _pair(conv.kernel_size), _pair(conv.stride), 0, device="meta")
        self.padding, self.weight, self.bias = conv.padding, conv.weight, conv.bias
        self._packed: PackedWeights | None = None

    @staticmethod
    def can_replace(module: nn.Module, dtype: torch.dtype) -> bool:
        """Whether there is something to rearrange: on the CPU, with oneDNN, for what it computes in ``dtype`` itself."""
        if type(module) is not nn.Conv2d or module.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        has_dtype = dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        if not has_dtype or isinstance(module.padding, str) or module.padding_mode != "zeros" or module.groups != 1:
            return False
        narrow = all(pad < size for pad, size in zip(module.padding, module.kernel_size, strict=True))
        return narrow and _pair(module.dilation) == ONE

    def unpack(self) -> None:
        """Parameters have changed: the next reading rearranges them anew."""
        self._packed = None

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:  # noqa: A002  (the name it has in torch)
        if self._packed is None:
            with torch.no_grad():
                self._packed = PackedWeights.of(self, input)
        return convolve_packed(input, self._packed)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weights: PackedWeights) -> Tensor:
        ctx.weights, ctx.shape = weights, images.shape
        return weights.convolve(images, weights.padding)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (as torch asks for it)
        ctx: Any, given: Tensor
    ) -> tuple[Tensor, None]:
        return ctx.weights.gradient(given, ctx.shape), None


def _rearrange(weight: Tensor, stride: Pair, padding: Pair, shape: list[int]) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, ONE, 1, shape)


def _convolve(images: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(images, weight, bias, padding, stride, ONE, 1, "none", [], "")


def _turned(weight: Tensor, padding: Pair) -> Pair:
    """The padding of the convolution that goes backwards."""
    return weight.shape[2] - 1 - padding[0], weight.shape[3] - 1 - padding[1]


def _pair(value: tuple[int, ...]) -> Pair:
    return value[0], value[-1]
