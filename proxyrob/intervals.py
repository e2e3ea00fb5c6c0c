"""Intervals for shares, counts and means; wherever an accuracy is shown, one of these stands beside it."""

import math
from statistics import NormalDist

import numpy as np
from jaxtyping import Float
from scipy import stats

from proxyrob.storage import Report


class Measured(Report):
    """A figure with its interval and the number of images it was measured on; shares are shares of 1."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def measure_share(successes: int, n: int, confidence: float = 0.95) -> Measured:
    """A share with Wilson's score interval (Wilson 1927).

    Raises ``ValueError`` unless 0 ≤ successes ≤ n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"expected 0 ≤ successes ≤ n with n > 0, got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Measured(value=share, low=low, high=high, n=n)


def measure_mean(values: Float[np.ndarray, " n"], confidence: float = 0.95) -> Measured:
    """A mean with Student's interval.

    Raises ``ValueError`` for fewer than two values.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"expected at least two values for an interval of their mean, got {n}")
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.5 + confidence / 2.0, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Measured(value=mean, low=mean - half, high=mean + half, n=n)
