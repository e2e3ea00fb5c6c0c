"""The images of a batch that still stand, and the adversarial images of those that do not."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Confirm = Callable[[Float[Tensor, "m c h w"], Int64[Tensor, " m"]], Bool[Tensor, " m"]]
"""Says of images that an attack takes for misclassified, and of their labels, which of them really are."""


def believe(images: Float[Tensor, "m c h w"], labels: Int64[Tensor, " m"]) -> Bool[Tensor, " m"]:
    """Confirm everything: the model that is attacked is the model that counts."""
    return torch.ones(len(images), dtype=torch.bool, device=images.device)


@dataclass(frozen=True)
class Attacked:
    """What an attack made of a batch: an adversarial image for each that it broke, the image itself for the others."""

    images: Float[Tensor, "b c h w"]
    broken: Bool[Tensor, " b"]


@dataclass
class RowState:
    """Tensors that have a row for each image that still stands: the fields of the dataclass that inherits this."""

    def keep(self, chosen: Bool[Tensor, " m"]) -> None:
        """Forget the other rows."""
        if not bool(chosen.all()):
            for field in fields(self):
                setattr(self, field.name, getattr(self, field.name)[chosen])


class Standing:
    """The images of a batch that an attack has not broken yet.

    An image is broken by the first adversarial image that ``confirm`` confirms; without confirmation it goes on standing.
    """

    def __init__(self, images: Float[Tensor, "b c h w"], labels: Int64[Tensor, " b"], confirm: Confirm) -> None:
        self._labels, self._confirm = labels, confirm
        self._found = images.clone()
        self._broken = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    @property
    def rows(self) -> Int64[Tensor, " m"]:
        """Which images stand."""
        return (~self._broken).nonzero().squeeze(1)

    def break_with(
        self, rows: Int64[Tensor, " m"], candidates: Float[Tensor, "m c h w"], fooled: Bool[Tensor, " m"]
    ) -> Bool[Tensor, " m"]:
        """Record the candidates that fooled the model, where that is confirmed; which of ``rows`` stand afterwards."""
        standing = torch.ones_like(fooled)
        chosen = fooled.nonzero().squeeze(1)
        if len(chosen):
            chosen = chosen[self._confirm(candidates[chosen], self._labels[rows[chosen]])]
            self._found[rows[chosen]] = candidates[chosen]
            self._broken[rows[chosen]] = True
            standing[chosen] = False
        return standing

    def outcome(self) -> Attacked:
        """What is known by now."""
        return Attacked(self._found, self._broken.clone())
