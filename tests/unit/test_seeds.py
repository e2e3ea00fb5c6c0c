"""Two ways of making a model, over several seeds."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from proxyrob.compare import Verdict, compare_over_seeds, summarise_seeds
from proxyrob.evaluate import STANDARD_ATTACKS, VerdictHeader, tabulate_verdicts

ATTACKS = {**dict.fromkeys(STANDARD_ATTACKS, "standard"), "pgd-20": "PGD"}
OURS, THEIRS = (0.61, 0.66, 0.64, 0.67), (0.55, 0.58, 0.54, 0.60)


def test_mean_spread_and_interval_are_students() -> None:
    """Sample standard deviations, and the interval of a paired t test at the same confidence."""
    found = summarise_seeds(OURS, THEIRS, confidence=0.9)
    peer = stats.ttest_rel(OURS, THEIRS).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((peer.low, peer.high))
    assert (found.candidate.mean, found.candidate.sd) == pytest.approx((0.645, np.std(OURS, ddof=1)))
    assert (found.reference.values, found.confidence) == (THEIRS, 0.9)
    assert found.difference.values == pytest.approx((0.06, 0.08, 0.10, 0.07))
    assert found.difference.mean == pytest.approx(0.0775)


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (OURS, THEIRS, "PASS"),
        (THEIRS, OURS, "FAIL"),
        ((0.6, 0.5), (0.5, 0.55), "UNDECIDED"),
        ((0.6, 0.5, 0.7), (0.59, 0.51, 0.69), "UNDECIDED"),
    ],
)
def test_the_verdict_is_that_of_the_interval(ours: tuple[float, ...], theirs: tuple[float, ...], verdict: Verdict) -> None:
    """Better or worse on average over seeds, or neither shown."""
    assert summarise_seeds(ours, theirs).verdict == verdict


def test_equal_differences_decide_nothing() -> None:
    """Two seeds that gain exactly the same show no spread: an interval without width is no evidence."""
    found = summarise_seeds((0.6, 0.7), (0.5, 0.6))
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    assert found.verdict == "UNDECIDED"


@pytest.mark.parametrize(("ours", "theirs"), [((0.5,), (0.4,)), ((0.5, 0.6), (0.4, 0.5, 0.6)), ((), ())])
def test_a_spread_needs_two_seeds_on_both_sides(ours: tuple[float, ...], theirs: tuple[float, ...]) -> None:
    """One seed has no spread, and without its partner a seed makes no difference."""
    with pytest.raises(ValueError, match=f"at least two seeds, got {len(ours)} and {len(theirs)} shares"):
        summarise_seeds(ours, theirs)


def _verdicts(broken: int, data: str = "a", **values: Any) -> tuple[pd.DataFrame, VerdictHeader]:
    """Twenty images, of which APGD breaks the first ``broken`` and PGD half as many."""
    rows = np.arange(20)
    hits = {name: (rows < broken) & (name == "apgd-ce") for name in STANDARD_ATTACKS}
    given: dict[str, Any] = {"norm": "linf", "epsilon": "3/20", "attacks": ATTACKS, "seed": 0, "split": "test", "model": "m"}
    table = tabulate_verdicts(rows % 10, rows % 10, hits, {"pgd-20": rows < broken // 2})
    return table, VerdictHeader(**{**given, "data_sha256": data, **values})


def test_tables_are_compared_seed_by_seed() -> None:
    """Each figure of each seed is that of its table; the images may be others from seed to seed."""
    pairs = [(_verdicts(4, "a"), _verdicts(10, "a")), (_verdicts(6, "b"), _verdicts(10, "b"))]
    found = compare_over_seeds(pairs, confidence=0.8)
    assert list(found) == ["clean", "pgd", "autoattack"]
    assert found["autoattack"] == summarise_seeds((0.8, 0.7), (0.5, 0.5), confidence=0.8)
    assert found["pgd"].candidate.values == (0.9, 0.85)
    assert found["clean"].difference.values == (0.0, 0.0)


def test_both_of_a_seed_need_the_same_images() -> None:
    """Paired means on the same images."""
    with pytest.raises(ValueError, match=r"data_sha256 is a and b; evaluate both alike: run both on the same source"):
        compare_over_seeds([(_verdicts(4), _verdicts(5)), (_verdicts(4, "a"), _verdicts(5, "b"))])


@pytest.mark.parametrize("name", ["norm", "epsilon", "attacks"])
def test_seeds_under_other_conditions_are_not_averaged(name: str) -> None:
    """A pair that is sound by itself, under another threat model or attack than the first, is refused."""
    other = {"norm": "l2", "epsilon": "8/255", "attacks": {**ATTACKS, "square": "newer"}}[name]
    with pytest.raises(ValueError, match=f"cannot be compared: {name} is .* and .*; evaluate both alike"):
        compare_over_seeds([(_verdicts(4), _verdicts(5)), (_verdicts(4, **{name: other}), _verdicts(5, **{name: other}))])
