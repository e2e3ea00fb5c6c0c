"""Our intervals, bounds and tests against statsmodels'."""

import numpy as np
import pytest
import torch
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from proxyrob.certify import certify_image, lower_bound
from proxyrob.compare import compare_paired
from proxyrob.intervals import measure_share
from tests.toys import Scripted

COUNTS = [(0, 1), (1, 1), (0, 20), (20, 20), (1, 20), (13, 20), (797, 797), (623, 797), (5, 10_000), (9_999, 10_000)]


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "n"), COUNTS)
def test_wilsons_interval(successes: int, n: int, confidence: float) -> None:
    """The interval of a share is statsmodels' Wilson interval."""
    found = measure_share(successes, n, confidence)
    expected = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize(("successes", "n"), COUNTS)
def test_clopper_and_pearsons_bound(successes: int, n: int, alpha: float) -> None:
    """The one-sided bound at alpha is the lower end of statsmodels' two-sided interval at 2·alpha."""
    expected, _ = proportion_confint(successes, n, alpha=2 * alpha, method="beta")
    assert lower_bound(successes, n, alpha) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("count", [*range(440, 500), 0, 1, 250, 260, 277, 278, 300, 400, 500])
def test_algorithm_certify(count: int) -> None:
    """Cohen et al. 2019, CERTIFY, written from the paper: the same class, radius or abstention for the same answers."""
    sigma, alpha, n0, n = 0.5, 0.001, 20, 500
    first = [2] * 11 + [0] * 5 + [1] * 4
    second = np.random.default_rng(count).permutation([2] * count + [0] * (n - count)).tolist()
    row = certify_image(
        Scripted(first + second, num_classes=3),
        torch.zeros(1, 2, 2),
        sigma=sigma,
        n0=n0,
        n=n,
        alpha=alpha,
        batch_size=64,
        select=torch.Generator(),
        estimate=torch.Generator(),
    )
    chosen = int(np.bincount(first).argmax())  # ĉ_A, from counts0
    # LOWERCONFBOUND(counts[ĉ_A], n, 1 − α)
    lower = float(np.asarray(proportion_confint(second.count(chosen), n, alpha=2 * alpha, method="beta"))[0])
    if lower > 0.5:
        assert (row["prediction"], row["count"]) == (chosen, count)
        assert row["radius_l2"] == pytest.approx(sigma * stats.norm.ppf(lower), rel=1e-9)
    else:
        assert (row["prediction"], row["radius_l2"]) == (None, 0.0)


@pytest.mark.parametrize(("ours_only", "theirs_only"), [(0, 1), (1, 0), (3, 3), (9, 1), (1, 9), (30, 12), (100, 140)])
def test_mcnemars_exact_test(ours_only: int, theirs_only: int) -> None:
    """The p-value of a comparison is statsmodels' exact McNemar test."""
    counts = [ours_only, theirs_only, 50, 20]
    candidate, reference = (np.repeat(kinds, counts) for kinds in ([True, False, True, False], [False, True, True, False]))
    expected = mcnemar([[50, ours_only], [theirs_only, 20]], exact=True).pvalue  # pyright: ignore[reportAttributeAccessIssue]  (set at run time)
    assert compare_paired(candidate, reference).p_value == pytest.approx(expected, rel=1e-9)
