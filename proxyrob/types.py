"""Types that more than one part of the library speaks, and the one conversion between stored and computed images."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor


class OnProgress(Protocol):
    """Told after each piece of work how far it is; ``figures`` are numbers worth showing, such as the loss."""

    def __call__(self, done: int, total: int, **figures: float) -> None: ...


def no_progress(done: int, total: int, **figures: float) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class ImageBatch:
    """Images in [0,1] with their labels.

    ``indices`` are the rows in the data set that the batch was taken from, so that a failure can name its images.
    """

    images: Float[Tensor, "b c h w"]
    labels: Int64[Tensor, " b"]
    indices: Int64[np.ndarray, " b"]

    def __len__(self) -> int:
        return len(self.labels)


def as_images(stored: UInt8[np.ndarray, "n h w c"], device: torch.device | str = "cpu") -> Float[Tensor, "n c h w"]:
    """Stored uint8 NHWC images as float32 NCHW in [0,1] on ``device``; it is the bytes that travel there."""
    levels = torch.from_numpy(stored if stored.flags.writeable and stored.flags.forc else np.array(stored))
    if torch.device(device).type == "cuda":
        levels = levels.pin_memory().to(device, non_blocking=True)
    planes = levels.permute(0, 3, 1, 2).contiguous()  # while they are bytes: a quarter of what they are afterwards
    # one channel has the strides of either layout, by which torch would choose how to convolve, and so how to round
    planes = planes.flatten().view(planes.shape)
    return planes.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)


def as_stored(images: Float[Tensor, "n c h w"]) -> UInt8[np.ndarray, "n h w c"]:
    """Float images as stored uint8 NHWC; values outside [0,1] are clipped, the rest rounded to the nearest of 256 levels."""
    levels = images.detach().clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(0, 2, 3, 1).cpu().numpy())
