"""The denoiser of the diffusion proxy: a residual MLP over flattened images, for tiny images."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


class Denoiser(nn.Module):
    """Predicts the velocity v of a noisy image at a time step (Salimans & Ho 2022).

    With ``num_classes`` 0 it is unconditional and the labels it is given are ignored.
    """

    def __init__(self, num_pixels: int, num_classes: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.width = width
        self.inlet = nn.Linear(num_pixels, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_classes, width) if num_classes else None
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(num_blocks)
        )
        self.outlet = nn.Linear(width, num_pixels)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)

    def forward(
        self, noisy: Float[Tensor, "b p"], time: Int64[Tensor, " b"], labels: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b p"]:
        condition = self.time(self._embed(time, noisy.dtype))
        if self.classes is not None:
            condition = condition + self.classes(labels)
        hidden = self.inlet(noisy)
        for block in self.blocks:
            hidden = hidden + block(hidden + condition)
        return self.outlet(hidden)

    def _embed(self, time: Int64[Tensor, " b"], dtype: torch.dtype) -> Float[Tensor, "b w"]:
        half = self.width // 2
        frequencies = torch.exp(torch.arange(half, device=time.device, dtype=dtype) * (-math.log(10_000.0) / half))
        angles = time.to(dtype)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)
