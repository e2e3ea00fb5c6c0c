"""Near-duplicates of test images among synthetic ones: what must not be trained on."""

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from proxyrob.shards import read_manifest, read_shard
from proxyrob.source import read_split
from proxyrob.storage import DataPlace, Report, Stage
from proxyrob.types import OnProgress, as_images, no_progress

MAX_RMS = 4.0 / 255.0
"""Images that differ by less than this, root mean square over pixels and channels, count as the same picture."""

BATCH_SIZE = 512
PAIRS_AT_ONCE = 4096
COARSE = 4
ROUNDING = 1e-5
"""More than float32 loses, of each value's share of a squared distance that is computed from products."""
NAMED_PAIRS = 100


class LeakFinder:
    """Finds images that equal a test image, or its mirror image, but for a difference of at most ``max_rms``.

    Exact, and quick: averaging over blocks never increases the root mean square of a difference (Jensen's inequality), so
    pairs that differ by more than ``max_rms`` in 4×4 averages cannot be near-duplicates, and the few that do not are
    compared in full.
    """

    def __init__(self, test: UInt8[np.ndarray, "t h w c"], *, max_rms: float = MAX_RMS, device: str = "cpu") -> None:
        self.max_rms, self.device = max_rms, device
        images = as_images(test)
        self.test = torch.cat([images, images.flip(3)])
        self.num_test = len(test)
        self.image_shape = tuple(int(size) for size in test.shape[1:])
        self._coarse = _pool(self.test.to(device))

    def find(self, images: UInt8[np.ndarray, "n h w c"]) -> Int64[np.ndarray, " n"]:
        """For each image the row of the nearest test image that it nearly equals, or -1."""
        found = np.full(len(images), -1, np.int64)
        for start in range(0, len(images), BATCH_SIZE):
            part = as_images(images[start : start + BATCH_SIZE])
            coarse = _pool(part.to(self.device))
            # |a - b|² = |a|² + |b|² - 2ab, with a margin for its rounding
            squares = coarse.square().sum(1)[:, None] + self._coarse.square().sum(1)[None] - 2.0 * coarse @ self._coarse.T
            limit = coarse.shape[1] * (self.max_rms**2 + ROUNDING)
            pairs = (squares <= limit).nonzero().cpu()
            if not len(pairs):
                continue
            full = torch.cat([self._compare(part, some) for some in pairs.split(PAIRS_AT_ONCE)])
            for order in full.argsort(descending=True).tolist():  # the nearest comes last and stays
                if full[order] <= self.max_rms:
                    found[start + int(pairs[order, 0])] = int(pairs[order, 1]) % self.num_test
        return found

    def _compare(self, images: Float[Tensor, "n c h w"], pairs: Int64[Tensor, "p 2"]) -> Float[Tensor, " p"]:
        """The root mean square difference of each pair of an image and a test image."""
        return (images[pairs[:, 0]] - self.test[pairs[:, 1]]).square().flatten(1).mean(1).sqrt()


class LeakReport(Report):
    """Images of a set that are near-duplicates of test images; ``pairs`` are the first of them, with the test image."""

    num_images: int
    num_copies: int
    pairs: tuple[tuple[int, int], ...]
    max_rms: float


def find_leaks(*, source: Stage, images: DataPlace, device: str = "cpu", on_progress: OnProgress = no_progress) -> LeakReport:
    """Compare every image of a set with every test image of ``source``.

    Raises ``DataIntegrityError`` when a shard is damaged and ``ValueError`` when the images have another size.
    """
    manifest = read_manifest(images)
    finder = LeakFinder(read_split(source, "test").stored, device=device)
    if manifest.image_shape != finder.image_shape:
        raise ValueError(f"{images.uri} has images of shape {manifest.image_shape}, the test images have {finder.image_shape}")
    pairs: list[tuple[int, int]] = []
    num_copies = done = 0
    for shard in manifest.shards:
        found = finder.find(read_shard(images, shard, manifest.image_shape, mapped=True))
        rows = np.flatnonzero(found >= 0)
        num_copies += len(rows)
        pairs += [(shard.first_id + int(row), int(found[row])) for row in rows[: NAMED_PAIRS - len(pairs)]]
        done += shard.num_images
        on_progress(done, manifest.num_images)
    return LeakReport(num_images=done, num_copies=num_copies, pairs=tuple(pairs), max_rms=finder.max_rms)


def _pool(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
    """Averages over blocks of equal size, as vectors; images that cannot be cut into 4×4 blocks are left whole."""
    height, width = images.shape[2:]
    if height % COARSE or width % COARSE:
        return images.flatten(1)
    return F.avg_pool2d(images, (height // COARSE, width // COARSE)).flatten(1)
