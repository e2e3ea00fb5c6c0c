"""Sharing out in proportion."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyrob.shares import share_out


@pytest.mark.parametrize(
    ("count", "sizes", "shares"),
    [(10, [5, 5], [5, 5]), (3, [5, 5], [2, 1]), (1024, [5000] * 10, [103] * 4 + [102] * 6), (4, [1, 0, 7], [1, 0, 3])],
)
def test_shares_add_up(count: int, sizes: list[int], shares: list[int]) -> None:
    """Largest remainder: proportional to within one, exact in sum, never more than there are."""
    assert share_out(count, np.array(sizes)).tolist() == shares


@pytest.mark.parametrize("kind", [np.int64, np.float64])
def test_equal_remainders_go_to_the_earlier_place(kind: type[np.number]) -> None:
    """Of equal remainders the first is rounded up, also where the whole parts differ."""
    assert share_out(2, np.array([1, 1, 1], kind)).tolist() == [1, 1, 0]
    assert share_out(6, np.array([1, 3], kind)).tolist() == [2, 4]


def test_floats_tie_as_they_are_written() -> None:
    """50 as 0.3 to 0.9 is 12.5 to 37.5, though neither the sum nor the products are exact."""
    assert share_out(50, np.array([0.3, 0.9])).tolist() == [13, 37]


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=20), st.integers(1, 10**6))
def test_integers_are_shared_out_exactly(sizes: list[int], count: int) -> None:
    """The parts add up, and each is the exact share rounded down or up."""
    parts = share_out(count, np.array(sizes)).tolist()
    assert sum(parts) == count
    assert all(0 <= part - count * size // sum(sizes) <= 1 for part, size in zip(parts, sizes, strict=True))
