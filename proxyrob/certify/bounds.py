"""Confidence bounds and radii of randomized smoothing, in float64."""

from scipy import stats


def lower_bound(successes: int, n: int, alpha: float) -> float:
    """One-sided Clopper–Pearson: with probability at least 1 - alpha the true share is not below this.

    Raises ``ValueError`` unless 0 ≤ successes ≤ n, n > 0 and 0 < alpha < 1.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"expected 0 ≤ successes ≤ n with n > 0, got {successes} of {n}")
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"expected alpha strictly between 0 and 1, got {alpha}")
    return 0.0 if successes == 0 else float(stats.beta.ppf(alpha, successes, n - successes + 1))


def certified_radius(p_lower: float, sigma: float) -> float | None:
    """The L2 radius sigma · Φ⁻¹(p) within which the class cannot change (Cohen et al. 2019, theorem 1).

    ``None`` means abstain: the class is not shown to have more than half of the probability.
    """
    return sigma * float(stats.norm.ppf(p_lower)) if p_lower > 0.5 else None
