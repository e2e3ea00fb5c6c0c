"""Batches of real and synthetic images together."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from proxyrob.config.subset import SubsetConfig
from proxyrob.errors import DataIntegrityError
from proxyrob.mix.augment import cut_and_paste, draw_box, shift_and_mirror, soften
from proxyrob.mix.order import EpochOrder
from proxyrob.mix.view import SyntheticSet, SyntheticView, split_count
from proxyrob.rng import Streams
from proxyrob.source import Split
from proxyrob.types import ImageBatch, as_images

PREFETCHED = 2


@dataclass(frozen=True)
class RankShare:
    """Which images of a batch one of several ranks has: their places in the batch of all ranks, which has ``total``."""

    places: Int64[Tensor, " b"]
    total: int


@dataclass(frozen=True)
class MixedBatch(ImageBatch):
    """Real images first, then those of each synthetic set, with the weight of each image in the loss.

    ``indices`` are rows of the training split for the real part and image ids for the synthetic parts; ``parts`` names
    them and says how many images each has. ``targets`` are the labels, or after CutMix the share of each class. ``share`` is
    there where the batch is one of several ranks'.
    """

    targets: Int64[Tensor, " b"] | Float[Tensor, "b k"]
    weights: Float[Tensor, " b"]
    parts: tuple[tuple[str, int], ...]
    share: RankShare | None = None

    @property
    def num_real(self) -> int:
        return self.parts[0][1]

    def describe(self) -> str:
        """Which images these are, for an error text."""
        pieces, begin = [], 0
        for name, count in self.parts:
            pieces.append(f"{name} images {self.indices[begin : begin + count].tolist()}")
            begin += count
        return ", ".join(pieces)


@dataclass(frozen=True)
class Augmentation:
    """What is done to every image, real or synthetic.

    ``shift`` is the largest translation in pixels; ``flip`` mirrors half of the images; ``cutmix`` is the share of batches
    whose images exchange boxes.
    """

    shift: int = 0
    flip: bool = False
    cutmix: float = 0.0


@dataclass(frozen=True)
class _Stored:
    """A batch as it was read."""

    images: UInt8[np.ndarray, "b h w c"]
    labels: Int64[np.ndarray, " b"]
    indices: Int64[np.ndarray, " b"]
    targets: Int64[np.ndarray, " b"] | Float[np.ndarray, "b k"]


def require_equal_shares(counts: Iterable[int], num_ranks: int, *, in_pairs: bool) -> None:
    """Let each rank have as many images as another of every part of a batch, ``in_pairs`` where images are cut together.

    Raises ``ValueError`` where it cannot.
    """
    for count in counts:
        if count % num_ranks or (in_pairs and count // num_ranks % 2):
            even = " of an even number of images" if in_pairs else ""
            raise ValueError(
                f"{count} images of a batch cannot be shared by {num_ranks} process(es) in equal parts{even}; "
                "change batch_size, synthetic_fraction or the number of processes (PROXYROB_PROCESSES)"
            )


class Mix:
    """Real and labelled synthetic images, drawn without replacement within an epoch of each.

    A batch is a pure function of seed, step, rank and number of ranks: the ranks' batches of one step together are the
    batch that one rank alone has.
    """

    def __init__(
        self,
        real: Split,
        synthetic: Sequence[SyntheticSet] = (),
        *,
        batch_size: int,
        num_synthetic: int,
        gamma: float,
        num_classes: int,
        streams: Streams,
        augmentation: Augmentation = Augmentation(),
        subset: SubsetConfig | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """``batch_size`` and ``num_synthetic`` count the images of all ranks together.

        Raises ``ValueError`` when the parts cannot be divided among sets or ranks or have other image sizes, and
        ``DataIntegrityError`` when a set cannot be read.
        """
        if bool(synthetic) != bool(num_synthetic):
            raise ValueError(f"expected synthetic images exactly when a batch has some, got num_synthetic={num_synthetic}")
        self.real, self.streams, self.gamma, self.augmentation = real, streams, gamma, augmentation
        self.num_classes, self.rank, self.num_ranks = num_classes, rank, num_ranks
        self.num_real = batch_size - num_synthetic
        self.views = [
            SyntheticView(
                of, streams=streams, subset=subset, path="mix/synthetic" if number == 0 else f"mix/synthetic-{number}"
            )
            for number, of in enumerate(synthetic)
        ]
        self._counts = split_count(num_synthetic, [of.weight for of in synthetic]) if synthetic else ()
        for view in self.views:
            if view.image_shape != real.stored.shape[1:]:
                raise ValueError(
                    f"expected synthetic images of shape {real.stored.shape[1:]}, as the real ones, got {view.image_shape} in "
                    f"{view.of.images.uri}"
                )
            if len(view.class_names) != num_classes:
                raise DataIntegrityError(
                    f"{view.of.labels.uri} has labels of {len(view.class_names)} classes, the real images have {num_classes}"
                )
        require_equal_shares((self.num_real, *self._counts), num_ranks, in_pairs=augmentation.cutmix > 0.0)
        self._total = self.num_real + sum(self._counts)
        self._order = EpochOrder(streams, "mix/real", len(real))
        self._reading = Lock()

    def batch(self, step: int, device: torch.device | str = "cpu") -> MixedBatch:
        """The batch of a step.

        Weights are gamma / (real images) and (1 - gamma) / (synthetic images), so that the weighted sum of losses is
        γ·L(real) + (1-γ)·L(synthetic); with several ranks the mean of their sums is.

        Randomness: ``mix/real`` and ``mix/synthetic`` by epoch; ``mix/shift``, ``mix/flip`` and ``mix/cutmix`` by step.
        """
        stored = self._read(step)
        num_real, num_synthetic = self.num_real // self.num_ranks, len(stored.labels) - self.num_real // self.num_ranks
        weights = torch.full((len(stored.labels),), self.gamma / num_real)
        if num_synthetic:
            weights[num_real:] = (1.0 - self.gamma) / num_synthetic
        labels = torch.from_numpy(stored.labels).to(device)
        return MixedBatch(
            images=as_images(stored.images, device),
            labels=labels,
            indices=stored.indices,
            targets=labels if stored.targets is stored.labels else torch.from_numpy(stored.targets).to(device),
            weights=weights.to(device),
            parts=(
                ("real", num_real),
                *((view.of.name, count // self.num_ranks) for view, count in zip(self.views, self._counts, strict=True)),
            ),
            share=None if self.num_ranks == 1 else RankShare(torch.from_numpy(self._mine()).to(device), self._total),
        )

    def batches(self, first: int, stop: int, device: torch.device | str = "cpu") -> Iterator[MixedBatch]:
        """The batches of steps ``first`` to ``stop`` - 1; the next ones are made and sent to ``device`` in the background."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as maker:
            coming = [maker.submit(self.batch, step, device) for step in range(first, min(first + PREFETCHED, stop))]
            try:
                for step in range(first, stop):
                    if step + PREFETCHED < stop:
                        coming.append(maker.submit(self.batch, step + PREFETCHED, device))
                    yield coming.pop(0).result()
            finally:
                for future in coming:
                    future.cancel()

    def close(self) -> None:
        """Stop reading ahead."""
        for view in self.views:
            view.close()

    def _read(self, step: int) -> _Stored:
        begin, share = self._share(self.num_real)
        with self._reading:  # the orders and the open windows are those of one position: one reader at a time
            rows = self._order.take(step * self.num_real + begin, share)
            images, labels, indices = [self.real.stored[rows]], [self.real.labels[rows]], [rows]
            for view, count in zip(self.views, self._counts, strict=True):
                begin, share = self._share(count)
                for parts, found in zip((images, labels, indices), view.take(step * count + begin, share), strict=True):
                    parts.append(found)
        pictures, classes = np.concatenate(images), np.concatenate(labels)
        pictures = self._move(pictures, step)
        targets = classes
        if self.augmentation.cutmix:
            generator = self.streams.numpy("mix/cutmix", step=step)
            if generator.random() < self.augmentation.cutmix:
                pictures, share_of_neighbour = cut_and_paste(pictures, draw_box(generator, *pictures.shape[1:3]))
                targets = soften(classes, self.num_classes, share_of_neighbour)
            else:
                targets = soften(classes, self.num_classes, 0.0)
        return _Stored(pictures, classes, np.concatenate(indices), targets)

    def _share(self, count: int) -> tuple[int, int]:
        """The first image of this rank and its number of images, of ``count`` of all ranks."""
        share = count // self.num_ranks
        return self.rank * share, share

    def _move(self, images: UInt8[np.ndarray, "b h w c"], step: int) -> UInt8[np.ndarray, "b h w c"]:
        """Drawn for the images of all ranks, so that an image is moved alike whichever rank it is on."""
        shift, flip = self.augmentation.shift, self.augmentation.flip
        if not shift and not flip:
            return images
        mine, total = self._mine(), self._total
        offsets = np.full((2, total), shift)
        if shift:
            generator = self.streams.torch("mix/shift", step=step)
            offsets = torch.randint(0, 2 * shift + 1, (2, total), generator=generator).numpy()
        mirrored = self.streams.numpy("mix/flip", step=step).random(total) < 0.5 if flip else np.zeros(total, bool)
        return shift_and_mirror(images, offsets[:, mine], mirrored[mine], shift)

    def _mine(self) -> Int64[np.ndarray, " b"]:
        """The places of this rank's images in the batch of all ranks."""
        places, begin = [], 0
        for count in (self.num_real, *self._counts):
            first, share = self._share(count)
            places.append(np.arange(begin + first, begin + first + share))
            begin += count
        return np.concatenate(places)
