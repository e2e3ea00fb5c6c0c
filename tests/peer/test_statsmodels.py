"""Our intervals, bounds and tests against statsmodels'."""

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from proxyrob.certify import lower_bound
from proxyrob.compare import compare_paired
from proxyrob.intervals import measure_share

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


@pytest.mark.parametrize(("ours_only", "theirs_only"), [(0, 1), (1, 0), (3, 3), (9, 1), (1, 9), (30, 12), (100, 140)])
def test_mcnemars_exact_test(ours_only: int, theirs_only: int) -> None:
    """The p-value of a comparison is statsmodels' exact McNemar test."""
    counts = [ours_only, theirs_only, 50, 20]
    candidate, reference = (np.repeat(kinds, counts) for kinds in ([True, False, True, False], [False, True, True, False]))
    expected = mcnemar([[50, ours_only], [theirs_only, 20]], exact=True).pvalue  # pyright: ignore[reportAttributeAccessIssue]  (set at run time)
    assert compare_paired(candidate, reference).p_value == pytest.approx(expected, rel=1e-9)
