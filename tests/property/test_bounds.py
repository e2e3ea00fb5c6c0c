"""The confidence bound of randomized smoothing, for any counts."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from proxyrob.certify import certified_radius, lower_bound


@st.composite
def counts(draw: st.DrawFn, least: int = 0) -> tuple[int, int]:
    """Successes among trials."""
    n = draw(st.integers(max(1, least), 5000))
    return draw(st.integers(least, n)), n


alphas = st.floats(1e-6, 0.5)


@given(counts(), alphas)
def test_a_bound_is_never_above_the_share(count: tuple[int, int], alpha: float) -> None:
    """With alpha of at most one half the bound lies between 0 and k/n."""
    successes, n = count
    assert 0.0 <= lower_bound(successes, n, alpha) <= successes / n


@given(counts(least=1), alphas)
def test_a_bound_grows_with_the_successes(count: tuple[int, int], alpha: float) -> None:
    """One vote more never gives a smaller bound, nor a smaller radius."""
    successes, n = count
    less, more = lower_bound(successes - 1, n, alpha), lower_bound(successes, n, alpha)
    assert less < more
    assert (certified_radius(less, 0.25) or 0.0) <= (certified_radius(more, 0.25) or 0.0)


@given(counts(least=1), alphas, alphas)
def test_a_bound_falls_with_the_confidence(count: tuple[int, int], one: float, other: float) -> None:
    """Being wrong less often costs radius."""
    assume(abs(one - other) > 1e-9)
    assert lower_bound(*count, min(one, other)) < lower_bound(*count, max(one, other))


@given(counts(least=1), alphas)
def test_a_bound_solves_the_binomial_tail_equation(count: tuple[int, int], alpha: float) -> None:
    """At the bound, as many successes or more have probability alpha exactly: the definition of Clopper and Pearson."""
    successes, n = count
    share = lower_bound(successes, n, alpha)
    assert stats.binom.sf(successes - 1, n, share) == pytest.approx(alpha, rel=1e-6)


@given(st.floats(0.0, 1.0, exclude_max=True), st.floats(0.01, 2.0))
def test_a_radius_exists_exactly_for_a_majority(p_lower: float, sigma: float) -> None:
    """Above one half there is a radius and it is not negative; at or below it there is none."""
    radius = certified_radius(p_lower, sigma)
    assert (radius is not None) == (p_lower > 0.5)
    assert radius is None or radius >= 0.0
