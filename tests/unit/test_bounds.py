"""Confidence bounds and radii of randomized smoothing."""

import pytest

from proxyrob.certify import certified_radius, lower_bound


@pytest.mark.parametrize(
    ("successes", "n", "alpha", "expected"),
    [
        (100, 100, 0.001, 0.001 ** (1 / 100)),
        (1, 1, 0.05, 0.05),
        (0, 50, 0.001, 0.0),
        (9, 10, 0.05, 0.6058367),
    ],
)
def test_known_bounds(successes: int, n: int, alpha: float, expected: float) -> None:
    """All of n: alpha^(1/n). None: 0. 9 of 10 at 95 %: 0.606, as in tables."""
    assert lower_bound(successes, n, alpha) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(successes: int, n: int) -> None:
    """More votes than samples, or no sample, is a wrong argument."""
    with pytest.raises(ValueError, match=f"expected 0 ≤ successes ≤ n with n > 0, got {successes} of {n}"):
        lower_bound(successes, n, 0.01)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5])
def test_an_impossible_alpha_is_refused(alpha: float) -> None:
    """Alpha is a probability strictly between 0 and 1."""
    with pytest.raises(ValueError, match="expected alpha strictly between 0 and 1, got"):
        lower_bound(5, 10, alpha)


@pytest.mark.parametrize(("p_lower", "sigmas"), [(0.841344746, 1.0), (0.977249868, 2.0), (0.5 + 1e-9, 0.0)])
def test_the_radius_is_sigma_times_the_normal_quantile(p_lower: float, sigmas: float) -> None:
    """A class with 84 % of the probability is certified within one sigma, with 97.7 % within two."""
    assert certified_radius(p_lower, 0.25) == pytest.approx(0.25 * sigmas, abs=1e-6)


@pytest.mark.parametrize("p_lower", [0.0, 0.3, 0.5])
def test_no_majority_is_no_certificate(p_lower: float) -> None:
    """A class that is not shown to have more than half of the probability is abstained from."""
    assert certified_radius(p_lower, 0.25) is None
