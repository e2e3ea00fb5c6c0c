"""Rectangles of images, and which outputs of a convolution see them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from proxyrob.models.packed import PackedWeights, convolve_packed


@dataclass(frozen=True)
class Window:
    """A rectangle of an image or of a layer's output."""

    top: int
    left: int
    height: int
    width: int

    @property
    def place(self) -> tuple[slice, slice, slice, slice]:
        """The index of the rectangle in ``[b, c, h, w]``."""
        rows, columns = slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)
        return slice(None), slice(None), rows, columns

    @property
    def area(self) -> int:
        return self.height * self.width

    def within(self, other: "Window") -> "Window":
        """The same rectangle, seen from the corner of another one."""
        return Window(self.top - other.top, self.left - other.left, self.height, self.width)

    def joined(self, other: "Window") -> "Window":
        """The smallest rectangle around both."""
        top, left = min(self.top, other.top), min(self.left, other.left)
        bottom = max(self.top + self.height, other.top + other.height)
        right = max(self.left + self.width, other.left + other.width)
        return Window(top, left, bottom - top, right - left)

    def common(self, other: "Window") -> "Window":
        """The rectangle that lies in both."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom = min(self.top + self.height, other.top + other.height)
        right = min(self.left + self.width, other.left + other.width)
        return Window(top, left, bottom - top, right - left)


@dataclass(frozen=True)
class Convolution:
    """The arguments of a convolution; ``packed`` where they came as rearranged weights."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    packed: PackedWeights | None = None

    @staticmethod
    def of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Convolution | None":
        """``None`` for another function, or one that is not followed: dilated, or padded by the name of a rule."""
        if func is convolve_packed:
            packed: PackedWeights = args[1]
            return Convolution(packed.weight, packed.bias, packed.stride, packed.padding, 1, packed)
        if func is not F.conv2d:
            return None
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        given |= {**dict(zip(names, args, strict=False)), **kwargs}
        if isinstance(given["padding"], str) or _pair(given["dilation"]) != (1, 1):
            return None
        stride, padding = _pair(given["stride"]), _pair(given["padding"])
        return Convolution(given["weight"], given["bias"], stride, padding, given["groups"])

    def reached(self, window: Window, outputs: Window) -> Window:
        """The outputs that see the window, of all ``outputs``; as many wherever it lies, so that shapes do not vary."""
        top, height = self._reached(0, window.top, window.height, outputs.height)
        left, width = self._reached(1, window.left, window.width, outputs.width)
        return Window(top, left, height, width)

    def _reached(self, axis: int, begin: int, size: int, outputs: int) -> tuple[int, int]:
        kernel, stride = self.weight.shape[2 + axis], self.stride[axis]
        count = min((size + kernel - 2) // stride + 1, outputs)
        first = -((kernel - 1 - begin - self.padding[axis]) // stride)
        return min(max(first, 0), outputs - count), count

    def seen(self, window: Window) -> Window:
        """The inputs that the outputs in a window see, also over the edges."""
        return Window(
            window.top * self.stride[0] - self.padding[0],
            window.left * self.stride[1] - self.padding[1],
            (window.height - 1) * self.stride[0] + self.weight.shape[2],
            (window.width - 1) * self.stride[1] + self.weight.shape[3],
        )

    def compute(self, values: Float[Tensor, "b c k l"]) -> Float[Tensor, "b d i j"]:
        """Of all inputs, over whose edges it reaches."""
        return self._convolve(values, self.padding)

    def compute_inside(self, values: Float[Tensor, "b c k l"]) -> Float[Tensor, "b d i j"]:
        """Of the inputs that some outputs see, over whose edges it does not reach."""
        return self._convolve(values, (0, 0))

    def _convolve(self, values: Float[Tensor, "b c k l"], padding: tuple[int, int]) -> Float[Tensor, "b d i j"]:
        if self.packed is not None:
            return self.packed.convolve(values, padding)
        return F.conv2d(values, self.weight, self.bias, self.stride, padding, 1, self.groups)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
