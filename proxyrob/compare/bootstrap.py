"""The paired bootstrap (Efron 1979) of a difference between two accuracies, over images."""

import numpy as np

from proxyrob.rng import Streams
from proxyrob.storage import Report

RESAMPLES = 10_000


class BootstrapInterval(Report):
    """A percentile interval, as a share of the images, and what it takes to compute it again."""

    low: float
    high: float
    resamples: int
    seed: int


def bootstrap_difference(
    candidate_only: int, reference_only: int, n: int, *, confidence: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> BootstrapInterval:
    """The percentile interval of (candidate_only - reference_only) / n under resampling of ``n`` images with replacement.

    A resample is known by how many of its images only the candidate and only the reference is right on, and drawing images
    draws these two counts from a multinomial distribution: counts are drawn here, and the interval is that of the images.
    Where the two never disagree it has no width, for a bootstrap cannot see what did not happen.

    Randomness: ``compare/bootstrap``.
    """
    shares = np.array([candidate_only, reference_only, n - candidate_only - reference_only]) / n
    drawn = Streams(seed).numpy("compare/bootstrap").multinomial(n, shares, size=resamples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [0.5 - confidence / 2.0, 0.5 + confidence / 2.0])
    return BootstrapInterval(low=float(low), high=float(high), resamples=resamples, seed=seed)
