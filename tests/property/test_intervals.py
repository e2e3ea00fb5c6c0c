"""Intervals, for any counts and values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyrob.intervals import measure_mean, measure_share


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    """Successes among trials."""
    n = draw(st.integers(1, 100_000))
    return draw(st.integers(0, n)), n


@given(counts(), st.floats(0.5, 0.999))
def test_an_interval_contains_its_share(count: tuple[int, int], confidence: float) -> None:
    """0 ≤ low ≤ share ≤ high ≤ 1, and it is an interval, not a point."""
    found = measure_share(*count, confidence)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    assert found.low < found.high


@given(counts(), st.floats(0.5, 0.999))
def test_failures_mirror_successes(count: tuple[int, int], confidence: float) -> None:
    """The interval of the failures is that of the successes, mirrored."""
    successes, n = count
    found, mirrored = measure_share(successes, n, confidence), measure_share(n - successes, n, confidence)
    assert (found.low, found.high) == pytest.approx((1 - mirrored.high, 1 - mirrored.low), abs=1e-12)


@given(counts(), st.integers(2, 20))
def test_more_images_give_a_narrower_interval(count: tuple[int, int], times: int) -> None:
    """The same share of more images is known better."""
    successes, n = count
    few, many = measure_share(successes, n), measure_share(times * successes, times * n)
    assert many.high - many.low < few.high - few.low


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=50))
def test_an_interval_of_a_mean_contains_it_in_its_middle(values: list[float]) -> None:
    """Student's interval is symmetric about the mean, and the mean lies within the values."""
    found = measure_mean(np.array(values))
    assert found.low <= found.value <= found.high
    assert found.value - found.low == pytest.approx(found.high - found.value, abs=1e-6)
    assert min(values) - 1e-6 <= found.value <= max(values) + 1e-6
