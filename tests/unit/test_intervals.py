"""Intervals for shares and means."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from proxyrob.intervals import Measured, measure_mean, measure_share


def test_a_share_has_wilsons_interval() -> None:
    """8 of 10: Wilson's interval as printed in textbooks, 0.490 to 0.943 (Wald's would end above 1)."""
    found = measure_share(8, 10)
    assert (found.value, found.n) == (0.8, 10)
    assert (found.low, found.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_a_higher_confidence_gives_a_wider_interval() -> None:
    """The confidence is used."""
    narrow, wide = measure_share(8, 10, 0.9), measure_share(8, 10, 0.99)
    assert wide.low < narrow.low < 0.8 < narrow.high < wide.high


def test_extreme_shares_keep_their_border() -> None:
    """None of 20 has the lower end 0 exactly, all of 20 the upper end 1 exactly, and neither interval is empty."""
    none, all_of_them = measure_share(0, 20), measure_share(20, 20)
    assert (none.low, all_of_them.high) == (0.0, 1.0)
    assert none.high == pytest.approx(1 - all_of_them.low)
    assert 0.1 < none.high < 0.2


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5), (0, -1)])
def test_an_impossible_share_is_refused(successes: int, n: int) -> None:
    """More successes than trials, or no trial at all, is a wrong argument."""
    with pytest.raises(ValueError, match=f"expected 0 ≤ successes ≤ n with n > 0, got {successes} of {n}"):
        measure_share(successes, n)


def test_a_mean_has_students_interval() -> None:
    """1, 2, 3, 4: mean 2.5, half width t(0.975, 3) · s / √4 = 3.1824 · 1.2910 / 2."""
    found = measure_mean(np.array([1.0, 2.0, 3.0, 4.0]))
    half = 3.182446305 * math.sqrt(5 / 3) / 2
    assert (found.value, found.low, found.high, found.n) == pytest.approx((2.5, 2.5 - half, 2.5 + half, 4))


def test_a_mean_of_equal_values_has_no_width() -> None:
    """Values that do not vary give an interval of width 0, not NaN."""
    found = measure_mean(np.array([0.25, 0.25, 0.25]))
    assert (found.low, found.high) == (0.25, 0.25)


@pytest.mark.parametrize("count", [0, 1])
def test_a_mean_of_less_than_two_values_is_refused(count: int) -> None:
    """One value says nothing of its spread."""
    with pytest.raises(ValueError, match=f"expected at least two values for an interval of their mean, got {count}"):
        measure_mean(np.zeros(count))


def test_a_figure_is_shown_in_per_cent_with_its_interval() -> None:
    """Wherever an accuracy is shown, its interval stands beside it."""
    assert str(Measured(value=0.5, low=0.25, high=0.755, n=10)) == "50.0 % [25.0, 75.5]"


def test_a_figure_is_never_nan() -> None:
    """NaN is refused when it arises, not drawn or stored."""
    with pytest.raises(ValidationError):
        Measured(value=math.nan, low=0.0, high=1.0, n=1)
