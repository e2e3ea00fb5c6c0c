"""A model read again after a square of its input changed: only what depends on the square is computed anew.

A convolution sees its neighbourhood alone, so behind the first layers of a network a changed square is a slightly larger
changed square. Everything else there is as it was when the model was read last, and is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from proxyrob.attacks.windows import Convolution, Window

LARGEST_SHARE = 0.6
"""A layer of whose output a larger share is changed is computed whole, and so is everything after it."""

ELEMENTWISE = {F.relu, F.silu, torch.relu, Tensor.contiguous, Tensor.to, Tensor.float, Tensor.sub, Tensor.div, Tensor.mul}
"""Functions of a tensor and constants whose result at a place depends on that place alone."""

ADDITIONS = {torch.add, Tensor.add, Tensor.add_}
TOLERANCE = 0.02
"""By which share of the largest logit a reading may differ from that of the whole model; bfloat16 rounds to less."""

METADATA = {"__get__", "size", "dim", "__len__"}


class WindowedModel:
    """What a model's first layers gave for some images, and the model read again where a window of them has changed.

    Layers are followed as long as they are convolutions, additions and elementwise functions, and as long as a window of
    ``height`` × ``width`` does not become most of the layer. The logits are those of the whole model, to rounding.
    """

    def __init__(self, model: nn.Module, images: Float[Tensor, "b c h w"], height: int, width: int) -> None:
        self._model = model
        self._middle = Window((images.shape[2] - height) // 2, (images.shape[3] - width) // 2, height, width)
        recording = _Recording(images.clone(memory_format=torch.channels_last), self._middle)
        recording.read(model)
        self._steps = recording.steps
        self.saved_operations = recording.saved_operations
        """Multiplications and additions that reading a window saves, for one image."""
        self._last: list[_Followed] = []

    @property
    def size_bytes(self) -> int:
        """The memory that the outputs of layers take."""
        return sum(layer.values.numel() * layer.values.element_size() for layer in self._kept())

    def read(self, patch: Float[Tensor, "b c i j"], window: Window) -> Float[Tensor, "b k"]:
        """The logits of the images with ``patch`` in ``window``; the images themselves stay as they were."""
        rereading = _Rereading(self._steps, patch, window)
        logits = rereading.read(self._model)
        self._last = rereading.kept
        return logits

    def is_right(self) -> bool:
        """Whether the logits are those of the whole model, but for rounding, when the middle is inverted."""
        images = self._kept()[0].values
        changed = images.clone()
        changed[self._middle.place] = patch = 1.0 - images[self._middle.place]
        expected = self._model(changed)
        return bool((self.read(patch, self._middle) - expected).abs().max() <= TOLERANCE * expected.abs().max())

    def accept(self, rows: Bool[Tensor, " b"]) -> None:
        """Take over the last patch into these images."""
        for change in self._last:
            assert isinstance(change.layer, _Kept)
            change.layer.values[change.window.place][rows] = change.values[rows]

    def keep(self, rows: Bool[Tensor, " b"]) -> None:
        """Forget the other images."""
        for layer in self._kept():
            layer.values = layer.values[rows].contiguous(memory_format=torch.channels_last)
        self._last = []

    def _kept(self) -> list["_Kept"]:
        return [layer for layer in self._steps if isinstance(layer, _Kept)]


@dataclass
class _Kept:
    """The output of a layer as it was when the model was read last."""

    values: Float[Tensor, "b c h w"]

    def old(self, window: Window) -> Float[Tensor, "b c i j"]:
        return self.values[window.place]

    @property
    def whole(self) -> Window:
        return Window(0, 0, self.values.shape[2], self.values.shape[3])


@dataclass(frozen=True)
class _Derived:
    """The output of an elementwise function, which is not kept but computed from that of the layer before it."""

    parent: "_Layer"
    function: Callable[[Tensor], Tensor]

    def old(self, window: Window) -> Float[Tensor, "b c i j"]:
        return self.function(self.parent.old(window))

    @property
    def whole(self) -> Window:
        return self.parent.whole


_Layer = _Kept | _Derived


@dataclass(frozen=True)
class _Followed:
    """A layer's output in a model that is being read: all of it in a recording, what is inside the window in a rereading."""

    layer: _Layer
    window: Window
    values: Float[Tensor, "b c i j"]

    def around(self, window: Window) -> Float[Tensor, "b c k l"]:
        """In a rereading, the values in a rectangle of the output; over its edges, where it may reach, they are 0."""
        inside, changed = window.common(self.layer.whole), window.common(self.window)
        b, c = self.values.shape[:2]
        values = self.values.new_zeros((b, window.height, window.width, c)).permute(0, 3, 1, 2)  # channels_last
        values[inside.within(window).place] = self.layer.old(inside)
        values[changed.within(window).place] = self.values[changed.within(self.window).place]
        return values


class _Reading(TorchFunctionMode):
    """Follows what depends on the images from function to function, while a model is read.

    A function that would change its input gets a copy, and whatever asks for that input later gets the copy: what is kept
    stays as it is.
    """

    def __init__(self, images: _Followed) -> None:
        super().__init__()
        self._images = images.values
        self._followed = {id(images.values): images}
        self._changed: dict[int, tuple[Tensor, Tensor]] = {}

    def read(self, model: nn.Module) -> Float[Tensor, "b k"]:
        with self:
            return model(self._images)

    def follow(self, layer: _Layer, window: Window, values: Tensor) -> Tensor:
        self._followed[id(values)] = _Followed(layer, window, values)  # which keeps the tensor, so that its id stays its own
        return values

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = args[:1]
        given = kwargs or {}
        leaves = _leaves(args, given)
        if self._changed and any(id(leaf) in self._changed for leaf in leaves):
            args, given = tree_map(lambda leaf: self._changed.get(id(leaf), (leaf, leaf))[1], (args, given))
            leaves = _leaves(args, given)
        followed = [self._followed[id(leaf)] for leaf in leaves if id(leaf) in self._followed]
        if not followed:
            return func(*args, **given)
        if getattr(func, "__name__", "") in METADATA:
            whole = followed[0].layer.whole
            return func(followed[0].values[:, :, :1, :1].expand(-1, -1, whole.height, whole.width), *args[1:], **given)
        changes = _changes_input(func, given)
        result = self._follow_function(func, args, given, followed)
        if result is None:
            args, given = tree_map(
                lambda leaf: self.whole(self._followed[id(leaf)]) if id(leaf) in self._followed else leaf, (args, given)
            )
            result = func(*args, **given)
            copy = args[0] if args else None
        else:
            copy = result
        if changes and own and isinstance(own[0], Tensor) and isinstance(copy, Tensor):
            self._changed[id(own[0])] = (own[0], copy)
        return result

    def _follow_function(
        self, func: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any], followed: list[_Followed]
    ) -> Tensor | None:
        """The result of a function that can be followed, else ``None``."""
        first, *others = followed
        if args[0] is not first.values:
            return None
        if not others and (convolution := Convolution.of(func, args, given)) is not None:
            return self.convolve(first, convolution)
        if func in ADDITIONS and len(args) == 2 and len(others) == 1 and not given:
            return self.add(first, others[0])
        if not others and _is_elementwise(func, args, given):
            return self.apply(first, _elementwise(func, args[1:], given))
        return None

    def convolve(self, given: _Followed, convolution: Convolution) -> Tensor | None:
        raise NotImplementedError

    def add(self, one: _Followed, other: _Followed) -> Tensor | None:
        raise NotImplementedError

    def apply(self, given: _Followed, function: Callable[[Tensor], Tensor]) -> Tensor:
        raise NotImplementedError

    def whole(self, given: _Followed) -> Tensor:
        raise NotImplementedError


class _Recording(_Reading):
    """Reads a model whole, and notes which layers a window can be followed through."""

    def __init__(self, images: Float[Tensor, "b c h w"], window: Window) -> None:
        layer = _Kept(images)
        super().__init__(_Followed(layer, window, images))
        self.steps: list[_Layer | None] = [layer]
        self.saved_operations = 0

    def convolve(self, given: _Followed, convolution: Convolution) -> Tensor | None:
        values = convolution.compute(given.values)
        layer = _Kept(values)
        window = convolution.reached(given.window, layer.whole)
        if self._note(layer, window):
            self.saved_operations += 2 * convolution.weight.numel() * (layer.whole.area - window.area)
            return self.follow(layer, window, values)
        return values

    def add(self, one: _Followed, other: _Followed) -> Tensor | None:
        layer = _Kept(one.values + other.values)
        window = one.window.joined(other.window)
        return self.follow(layer, window, layer.values) if self._note(layer, window) else layer.values

    def apply(self, given: _Followed, function: Callable[[Tensor], Tensor]) -> Tensor:
        layer = _Derived(given.layer, function)
        self.steps.append(layer)
        return self.follow(layer, given.window, function(given.values))

    def whole(self, given: _Followed) -> Tensor:
        return given.values.clone()  # the function may change it

    def _note(self, layer: _Kept, window: Window) -> bool:
        is_small = window.area <= LARGEST_SHARE * layer.whole.area
        self.steps.append(layer if is_small else None)
        return is_small


class _Rereading(_Reading):
    """Reads a model where a window has changed, through the layers that a recording noted."""

    def __init__(self, steps: list[_Layer | None], patch: Float[Tensor, "b c i j"], window: Window) -> None:
        images = steps[0]
        assert isinstance(images, _Kept)
        changed = _Followed(images, window, patch)
        super().__init__(changed)
        self._steps = iter(steps[1:])
        self.kept = [changed]

    def convolve(self, given: _Followed, convolution: Convolution) -> Tensor | None:
        layer = next(self._steps)
        if layer is None:
            return None
        window = convolution.reached(given.window, layer.whole)
        return self._keep(layer, window, convolution.compute_inside(given.around(convolution.seen(window))))

    def add(self, one: _Followed, other: _Followed) -> Tensor | None:
        layer = next(self._steps)
        if layer is None:
            return None
        window = one.window.joined(other.window)
        return self._keep(layer, window, one.around(window) + other.around(window))

    def apply(self, given: _Followed, function: Callable[[Tensor], Tensor]) -> Tensor:
        layer = next(self._steps)
        assert layer is not None
        return self.follow(layer, given.window, function(given.values))

    def whole(self, given: _Followed) -> Tensor:
        return given.around(given.layer.whole)

    def _keep(self, layer: _Layer, window: Window, values: Tensor) -> Tensor:
        self.kept.append(_Followed(layer, window, values))
        return self.follow(layer, window, values)


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Everything that a function is given, also inside lists: most are given none, which is told faster than followed."""
    flat = [*args, *kwargs.values()]
    return tree_leaves(flat) if any(isinstance(leaf, list | tuple | dict) for leaf in flat) else flat


def _changes_input(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function works in place: ``relu_``, ``__setitem__``, ``relu(…, inplace=True)``."""
    name = getattr(func, "__name__", "")
    return bool(kwargs.get("inplace")) or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _is_elementwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func is F.batch_norm:  # a constant factor and summand for each channel, but in training
        return kwargs.get("training") is False
    return func in ELEMENTWISE and all(
        not isinstance(value, Tensor) or value.dim() == 0 or (value.dim() == 4 and value.shape[2:] == (1, 1))
        for value in (*args[1:], *kwargs.values())
    )


def _elementwise(func: Callable[..., Any], rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    given = {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs  # what is kept must stay as it is
    return lambda values: func(values, *rest, **given)
