"""Threat models, for any norm and fraction."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyrob.threat import LARGEST_EPSILON, Norm, Threat, parse_threat

norms: st.SearchStrategy[Norm] = st.sampled_from(["linf", "l2"])
positive = st.fractions(Fraction(1, 10_000), Fraction(10), max_denominator=10_000)


@given(norms, positive)
def test_a_threat_is_read_as_it_is_written(norm: Norm, epsilon: Fraction) -> None:
    """Whatever can be made can be written and read without losing a digit; what cannot be made cannot be read either."""
    if epsilon <= LARGEST_EPSILON[norm]:
        threat = Threat(norm, epsilon)
        assert parse_threat(str(threat)) == threat
    else:
        with pytest.raises(ValueError, match="expected an epsilon"):
            parse_threat(f"{norm}:{epsilon}")


@given(norms, st.integers(1, 999), st.integers(0, 3))
def test_decimals_are_read_exactly(norm: Norm, digits: int, zeros: int) -> None:
    """0.15 is 3/20 and not the binary fraction next to it."""
    text = f"0.{'0' * zeros}{digits}"
    places = zeros + len(str(digits))
    assert parse_threat(f"{norm}:{text}") == Threat(norm, Fraction(digits, 10**places))


@given(norms, positive, positive)
def test_equal_radii_are_equal_threats(norm: Norm, one: Fraction, other: Fraction) -> None:
    """Two threats are equal, and print alike, exactly when their radii are."""
    one, other = one / 10, other / 10
    first, second = Threat(norm, one), Threat(norm, other)
    assert (first == second) == (one == other) == (str(first) == str(second))


@given(norms, positive, st.integers(1, 200_000))
def test_the_enclosing_l2_radius_is_the_least_that_does_not_fall_short(norm: Norm, epsilon: Fraction, num_values: int) -> None:
    """Compared as exact fractions: not below √d · epsilon, and the float64 before it is."""
    radius = Threat(norm, epsilon / 10).enclosing_l2_radius(num_values)
    square = (epsilon / 10) ** 2 * (num_values if norm == "linf" else 1)
    assert Fraction(radius) ** 2 >= square > Fraction(math.nextafter(radius, 0.0)) ** 2
