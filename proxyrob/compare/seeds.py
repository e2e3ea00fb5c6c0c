"""Two ways of making a model, each repeated with several seeds: mean, spread, and an interval of the difference."""

from collections.abc import Sequence

import numpy as np

from proxyrob.compare.paired import Verdict
from proxyrob.compare.tables import Verdicts, accuracies_of, compare_verdicts, require_same_conditions
from proxyrob.evaluate import robust_rows
from proxyrob.intervals import measure_mean
from proxyrob.storage import Report

ROUNDING = 1e-12
"""Differences of shares that are nearer to each other than this are equal."""


class Spread(Report):
    """A share for each seed, their mean and their standard deviation (of a sample: n - 1)."""

    values: tuple[float, ...]
    mean: float
    sd: float


class SeedComparison(Report):
    """A figure of both sides over the same seeds. ``low`` and ``high`` bound the mean difference."""

    candidate: Spread
    reference: Spread
    difference: Spread
    low: float
    high: float
    verdict: Verdict
    confidence: float


def compare_over_seeds(pairs: Sequence[tuple[Verdicts, Verdicts]], *, confidence: float = 0.95) -> dict[str, SeedComparison]:
    """Compare the verdict tables of two sides, a pair for each seed, by clean, PGD and AutoAttack accuracy.

    Raises ``ValueError`` when the tables of a pair, or any two, were found under different conditions: only the test images
    may be others from seed to seed.
    """
    conditions = pairs[0][0][1]
    for ours, theirs in pairs:
        require_same_conditions(conditions, ours[1], same_images=False)
        compare_verdicts(ours, theirs)
    found = {}
    for name, attacks in accuracies_of(conditions).items():
        sides = ([float(robust_rows(table, attacks).mean()) for table, _ in side] for side in zip(*pairs, strict=True))
        found[name] = summarise_seeds(*sides, confidence=confidence)
    return found


def summarise_seeds(candidate: Sequence[float], reference: Sequence[float], *, confidence: float = 0.95) -> SeedComparison:
    """Student's interval of the mean of the differences at equal seeds (Student 1908).

    PASS when the interval lies above 0, FAIL when it lies below, UNDECIDED otherwise, and where all differences are equal:
    so few seeds have then shown no spread, not that there is none.

    Raises ``ValueError`` unless there are equally many shares on both sides, and at least two.
    """
    if len(candidate) != len(reference) or len(candidate) < 2:
        raise ValueError(
            "expected a share for each seed on both sides, and at least two seeds, "
            f"got {len(candidate)} and {len(reference)} shares"
        )
    difference = np.subtract(candidate, reference)
    interval = measure_mean(difference, confidence)
    verdict: Verdict = "UNDECIDED"
    if float(np.ptp(difference)) > ROUNDING:
        verdict = "PASS" if interval.low > 0.0 else "FAIL" if interval.high < 0.0 else "UNDECIDED"
    return SeedComparison(
        candidate=_spread(candidate),
        reference=_spread(reference),
        difference=_spread(difference),
        low=interval.low,
        high=interval.high,
        verdict=verdict,
        confidence=confidence,
    )


def _spread(values: Sequence[float] | np.ndarray) -> Spread:
    return Spread(values=tuple(float(value) for value in values), mean=float(np.mean(values)), sd=float(np.std(values, ddof=1)))
