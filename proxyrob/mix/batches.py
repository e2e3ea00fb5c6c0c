"""Batches of real and synthetic images together."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from proxyrob.errors import DataIntegrityError
from proxyrob.label import read_labels
from proxyrob.mix.order import EpochOrder
from proxyrob.rng import Streams
from proxyrob.shards import read_manifest, read_shard
from proxyrob.source import Split
from proxyrob.storage import Stage
from proxyrob.types import ImageBatch, as_images


@dataclass(frozen=True)
class MixedBatch(ImageBatch):
    """Real images first, then synthetic ones, with the weight of each image in the loss.

    ``indices`` are rows of the training split for the real part and image ids for the synthetic part.
    """

    weights: Float[Tensor, " b"]
    num_real: int

    def describe(self) -> str:
        """Which images these are, for an error text."""
        real, synthetic = self.indices[: self.num_real], self.indices[self.num_real :]
        return f"real images {real.tolist()}, synthetic images {synthetic.tolist()}"


class Mix:
    """Real and labelled synthetic images, drawn without replacement within an epoch of each."""

    def __init__(
        self,
        real: Split,
        synthetic: tuple[UInt8[np.ndarray, "n h w c"], Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]] | None,
        *,
        batch_size: int,
        num_synthetic: int,
        gamma: float,
        shift: int,
        streams: Streams,
    ) -> None:
        """``synthetic`` is images, labels and image ids, or ``None`` for real images alone."""
        if (synthetic is None) != (num_synthetic == 0):
            raise ValueError(f"expected synthetic images exactly when a batch has some, got num_synthetic={num_synthetic}")
        if synthetic is not None and synthetic[0].shape[1:] != real.stored.shape[1:]:
            raise ValueError(f"expected synthetic images of shape {real.stored.shape[1:]}, got {synthetic[0].shape[1:]}")
        self.real, self.synthetic = real, synthetic
        self.num_real, self.num_synthetic = batch_size - num_synthetic, num_synthetic
        self.gamma, self.shift, self.streams = gamma, shift, streams
        self._real_order = EpochOrder(streams, "mix/real", len(real))
        self._synthetic_order = EpochOrder(streams, "mix/synthetic", len(synthetic[0])) if synthetic is not None else None

    def batch(self, step: int, device: torch.device | str = "cpu") -> MixedBatch:
        """The batch of a step: a pure function of the seed and the step.

        Weights are gamma / (real images) and (1 - gamma) / (synthetic images), so that the weighted sum of losses is
        γ·L(real) + (1-γ)·L(synthetic).

        Randomness: ``mix/real`` and ``mix/synthetic`` by epoch, ``mix/shift`` by step.
        """
        rows = self._real_order.take(step * self.num_real, self.num_real)
        stored, labels, indices = [self.real.stored[rows]], [self.real.labels[rows]], [rows]
        weights = [np.full(self.num_real, self.gamma / self.num_real, np.float32)]
        if self.synthetic is not None and self._synthetic_order is not None:
            rows = self._synthetic_order.take(step * self.num_synthetic, self.num_synthetic)
            for parts, array in zip((stored, labels, indices), self.synthetic, strict=True):
                parts.append(array[rows])
            weights.append(np.full(self.num_synthetic, (1.0 - self.gamma) / self.num_synthetic, np.float32))
        images = as_images(np.concatenate(stored)).to(device)
        if self.shift:
            images = shift_images(images, self.shift, self.streams.torch("mix/shift", step=step))
        return MixedBatch(
            images=images,
            labels=torch.from_numpy(np.concatenate(labels)).to(device),
            indices=np.concatenate(indices),
            weights=torch.from_numpy(np.concatenate(weights)).to(device),
            num_real=self.num_real,
        )


def read_synthetic(
    samples: Stage, labels: Stage
) -> tuple[UInt8[np.ndarray, "n h w c"], Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """The images that passed the filter, their labels and their ids; every hash is checked.

    Raises ``DataIntegrityError`` when a shard or side table is damaged or they do not belong together.
    """
    manifest = read_manifest(samples.folder)
    table = read_labels(samples, labels)
    if len(table) != manifest.num_images:
        raise DataIntegrityError(
            f"{labels.folder} has labels for {len(table)} images, {samples.folder} has {manifest.num_images} images; "
            f"{labels.remedy}"
        )
    images = np.concatenate([read_shard(samples.folder, shard, manifest.image_shape) for shard in manifest.shards])
    kept = table.kept.to_numpy()
    return images[kept], table.label.to_numpy()[kept].astype(np.int64), table.id.to_numpy()[kept].astype(np.int64)


def shift_images(images: Float[Tensor, "b c h w"], most: int, generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Move each image by up to ``most`` pixels in each direction; the border is filled with 0.

    Randomness: one offset per image and direction, from ``generator`` (on the CPU).
    """
    b, _, h, w = images.shape
    padded = F.pad(images, (most, most, most, most))
    offsets = torch.randint(0, 2 * most + 1, (2, b), generator=generator).to(images.device)
    rows = offsets[0, :, None] + torch.arange(h, device=images.device)
    columns = offsets[1, :, None] + torch.arange(w, device=images.device)
    picture = torch.arange(b, device=images.device)
    return (
        padded.permute(0, 2, 3, 1)[picture[:, None, None], rows[:, :, None], columns[:, None, :]]
        .permute(0, 3, 1, 2)
        .contiguous()
    )
