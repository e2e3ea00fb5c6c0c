"""A model that holds few images at a time: batches are read in pieces, and computed again where a gradient is wanted."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from proxyrob.memory import held_at_once


class InPieces(nn.Module):
    """A model in eval mode, shown ``size`` images at a time: the same logits and gradients, to rounding, in less memory.

    Where a gradient is wanted a piece is forgotten as soon as it was read, and read again when its gradient is taken (Chen et
    al. 2016, through torch's ``checkpoint``): a third reading beside two, and one piece in memory.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        """Raises ``ValueError`` unless a piece has an image."""
        super().__init__()
        if size < 1:
            raise ValueError(f"expected at least one image in a piece, got {size}")
        self.model, self.size = model, size

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        if len(images) <= self.size:
            return self.model(images)
        pieces = images.split(self.size)
        if not (torch.is_grad_enabled() and images.requires_grad):
            return torch.cat([self.model(piece) for piece in pieces])
        return torch.cat(
            [
                checkpoint(self.model, piece, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
                for piece in pieces
            ]
        )


def in_pieces(model: nn.Module) -> nn.Module:
    """The model, shown no more images at a time than this process may hold; itself without such a limit."""
    size = held_at_once()
    return model if size is None else InPieces(model, size)
