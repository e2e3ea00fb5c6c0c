"""Two models on the same images: difference, interval, exact test, verdict."""

import math
from statistics import NormalDist
from typing import Literal

import numpy as np
from jaxtyping import Bool
from scipy import stats

from proxyrob.compare.bootstrap import BootstrapInterval, bootstrap_difference
from proxyrob.storage import Report

Verdict = Literal["PASS", "FAIL", "UNDECIDED"]


class Comparison(Report):
    """What a paired test says of a candidate against a reference on the same images.

    ``difference`` is candidate minus reference, as a share of the images. ``candidate_only`` and ``reference_only``
    count the images on which exactly one of the two is right: they carry all the evidence. All intervals cover the choice of
    the images, for these two models as they are; none covers another seed of their training.
    """

    difference: float
    low: float
    high: float
    p_value: float
    verdict: Verdict
    margin: float
    confidence: float
    n: int
    candidate_only: int
    reference_only: int
    bootstrap: BootstrapInterval


class Incomparable(Report):
    """Why nothing can be said of a candidate against a reference."""

    verdict: Literal["UNDECIDED"] = "UNDECIDED"
    reason: str


def compare_paired(
    candidate: Bool[np.ndarray, " n"],
    reference: Bool[np.ndarray, " n"],
    *,
    margin: float = 0.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare which images two models get right, image by image.

    The p-value is McNemar's exact two-sided test (McNemar 1947). The interval is the adjusted Wald interval for paired
    proportions (Bonett & Price 2012). Verdict with margin 0: PASS when the candidate is better (the interval lies above
    0 **and** p < 1 - confidence), FAIL when it is worse, likewise. With a margin m > 0: PASS when the candidate is not
    worse by m or more (the interval lies above -m), FAIL when it is (the interval lies below -m). UNDECIDED otherwise. The
    bootstrap interval stands beside them and decides nothing: ``seed`` is that of its resamples.

    Raises ``ValueError`` when the two do not have the same, positive number of images.
    """
    n = len(candidate)
    if n == 0 or n != len(reference):
        raise ValueError(f"expected both models on the same images, got {n} and {len(reference)}")
    candidate_only = int((candidate & ~reference).sum())
    reference_only = int((reference & ~candidate).sum())
    discordant = candidate_only + reference_only
    p_value = float(stats.binomtest(candidate_only, discordant).pvalue) if discordant else 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    up, down = (candidate_only + 1) / (n + 2), (reference_only + 1) / (n + 2)
    half = z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
    verdict: Verdict = "UNDECIDED"
    if low > -margin and (margin > 0 or p_value < 1 - confidence):
        verdict = "PASS"
    elif high < -margin and (margin > 0 or p_value < 1 - confidence):
        verdict = "FAIL"
    return Comparison(
        difference=(candidate_only - reference_only) / n,
        low=low,
        high=high,
        p_value=p_value,
        verdict=verdict,
        margin=margin,
        confidence=confidence,
        n=n,
        candidate_only=candidate_only,
        reference_only=reference_only,
        bootstrap=bootstrap_difference(candidate_only, reference_only, n, confidence=confidence, seed=seed),
    )
