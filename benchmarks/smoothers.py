"""What ``benchmarks/evaluation.py`` measures of randomized smoothing: the authors' program, a textbook's loop, and ours.

The authors' program is imported from a checkout. It was written for a SciPy that had ``binom_test``, of which CERTIFY makes
no use, and for CUDA, of which ``randn_like`` alone knows; both are stood in for.
"""

import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import signal, stats
from torch import Tensor, nn

from proxyrob.certify import SequentialDesign, certify_sequentially, count_votes
from proxyrob.config.certify import CertifyConfig
from proxyrob.models import FoldedCopy

SIGMA, NUM_CLASSES = 0.25, 10
PEER_BATCH = 1000  # certify.py's own
LOG = Path("data/certify/cifar10/resnet110/noise_0.25/test/sigma_0.25")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _OnCpu:
    """torch, whose noise is made where the images are."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def randn_like(images: Tensor, device: str) -> Tensor:
        return torch.randn_like(images)


def load_peer(checkout: Path) -> Any:
    """Their module ``core``."""
    if not hasattr(stats, "binom_test"):
        stats.binom_test = None  # pyright: ignore[reportAttributeAccessIssue]
    spec = importlib.util.spec_from_file_location("smoothing_core", checkout / "code" / "core.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.torch = _OnCpu()  # pyright: ignore[reportAttributeAccessIssue]
    return module


class Votes:
    """Votes for noisy copies of an image by one network, always on the same noise."""

    def __init__(self, network: nn.Module, example: Tensor, peer: Any | None) -> None:
        self.network = network
        self.read = {short: FoldedCopy(network, dtype, example=example) for short, dtype in PRECISIONS.items()}
        self._peer = None if peer is None else peer.Smooth(network, NUM_CLASSES, SIGMA)

    def count(self, who: str, image: Tensor, n: int, seed: int) -> list[int]:
        """By whoever counts: ``fp32`` and ``bf16`` are ours, ``peer`` and ``peer-64`` theirs by the size of the batch."""
        if who in self.read:
            generator = torch.Generator().manual_seed(seed)
            return count_votes(self.read[who], image, SIGMA, n, CertifyConfig().batch_size, generator).tolist()
        torch.manual_seed(seed)
        if who == "plain":
            return self._plain(image, n)
        assert self._peer is not None
        return self._peer._sample_noise(image, n, 64 if who == "peer-64" else PEER_BATCH).tolist()

    def _plain(self, image: Tensor, n: int) -> list[int]:
        votes = torch.zeros(NUM_CLASSES, dtype=torch.int64)
        with torch.no_grad():
            for start in range(0, n, PEER_BATCH):
                batch = image.repeat(min(PEER_BATCH, n - start), 1, 1, 1)
                votes += self.network(batch + torch.randn_like(batch) * SIGMA).argmax(1).bincount(minlength=NUM_CLASSES)
        return votes.tolist()

    def certify(self, short: str, images: Tensor, design: SequentialDesign, seed: int) -> int:
        """Certify some images on a design; how many samples that took."""
        config = CertifyConfig()
        streams = [[torch.Generator().manual_seed(seed + 2 * k + odd) for k in range(len(images))] for odd in (0, 1)]
        rows = certify_sequentially(
            self.read[short],
            images,
            design,
            sigma=SIGMA,
            n0=config.n0,
            batch_size=config.batch_size,
            select=streams[0],
            estimate=streams[1],
        )
        return config.n0 * len(rows) + sum(int(str(row["n"])) for row in rows)


def published_shares(checkout: Path) -> list[float]:
    """For each image of the authors' log the share of the votes that its class surely has (their lower bound, from the radius);
    one half where they abstained."""
    rows = [line.split("\t") for line in (checkout / LOG).read_text().splitlines()[1:]]
    return [0.5 if int(predicted) < 0 else float(stats.norm.cdf(float(radius) / SIGMA)) for _, _, predicted, radius, *_ in rows]


def follow(design: SequentialDesign, share: float) -> tuple[float, float]:
    """With which probability the one radius of a design is certified, and the mean number of samples, by the true share.

    Exact: the distribution of the votes is followed from look to look, less what has been concluded.
    """
    walk, certified, samples = np.ones(1), 0.0, 0.0
    for look, (seen, total) in enumerate(pairwise([0, *design.looks.tolist()])):
        samples += (total - seen) * float(walk.sum())
        step = stats.binom.pmf(np.arange(total - seen + 1), total - seen, share)
        walk = np.maximum(signal.fftconvolve(walk, step), 0.0)
        reached, known = design.conclude(look, np.arange(total + 1), np.zeros(total + 1, np.int64))
        certified += float(walk[reached > 0].sum())
        walk = np.where(known, 0.0, walk)
    return certified, samples


def fixed_share(design: SequentialDesign, n: int, alpha: float, share: float) -> float:
    """With which probability ``n`` samples certify the radius at once."""
    needed = float(stats.norm.cdf(design.radii[0] / SIGMA))
    votes = np.arange(n + 1)
    enough = stats.beta.ppf(alpha, votes, n - votes + 1) > needed
    return float(stats.binom.sf(int(np.flatnonzero(enough)[0]) - 1, n, share))
