"""A model as training reads it."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proxyrob.models import FoldedCopy


class Reader(nn.Module):
    """A model read in a precision, with float32 logits, after ``before`` was called, which may raise to end the work there.

    With ``example`` images a folded copy of the model is read in its place, as it was at the last ``refresh``.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype = torch.float32,
        *,
        before: Callable[[], None] = lambda: None,
        example: Float[Tensor, "b c h w"] | None = None,
    ) -> None:
        super().__init__()
        self.model = model if example is None else FoldedCopy(model, dtype, example=example)
        self.autocast_dtype = dtype if example is None else torch.float32
        self.before = before

    def refresh(self) -> None:
        """Read the model's weights as they are now."""
        if isinstance(self.model, FoldedCopy):
            self.model.refresh()

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        self.before()
        with torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast_dtype != torch.float32):
            return self.model(images).float()
