"""Paired comparisons, for any two models."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyrob.compare import compare_paired

OPPOSITE = {"PASS": "FAIL", "FAIL": "PASS", "UNDECIDED": "UNDECIDED"}


@st.composite
def verdicts(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two models' verdicts on the same images: any numbers of the four kinds of agreement."""
    kinds = [draw(st.integers(least, 60)) for least in (0, 0, 0, 1)]
    return np.repeat([True, False, True, False], kinds), np.repeat([False, True, True, False], kinds)


@given(verdicts(), st.floats(0.5, 0.999))
def test_exchanging_the_models_mirrors_the_comparison(pair: tuple[np.ndarray, np.ndarray], confidence: float) -> None:
    """Difference, interval, counts and verdict change sides; the p-value stays."""
    found = compare_paired(pair[0], pair[1], confidence=confidence)
    mirrored = compare_paired(pair[1], pair[0], confidence=confidence)
    assert mirrored.difference == -found.difference
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-12)
    assert (mirrored.candidate_only, mirrored.reference_only) == (found.reference_only, found.candidate_only)
    assert mirrored.p_value == pytest.approx(found.p_value)
    assert mirrored.verdict == OPPOSITE[found.verdict]


@given(verdicts(), st.floats(0.0, 0.5))
def test_a_verdict_agrees_with_its_interval(pair: tuple[np.ndarray, np.ndarray], margin: float) -> None:
    """PASS needs the interval above minus the margin, FAIL below it; what straddles it is undecided."""
    found = compare_paired(*pair, margin=margin)
    assert -1.0 <= found.low <= found.high <= 1.0
    if found.verdict == "PASS":
        assert found.low > -margin
    if found.verdict == "FAIL":
        assert found.high < -margin
    if found.low <= -margin <= found.high:
        assert found.verdict == "UNDECIDED"


@given(verdicts(), st.floats(0.01, 0.2), st.floats(0.01, 0.2))
def test_a_larger_margin_never_harms_the_candidate(pair: tuple[np.ndarray, np.ndarray], margin: float, more: float) -> None:
    """Who passes with a margin passes with a larger one; who fails with a larger one fails with the smaller."""
    strict, generous = compare_paired(*pair, margin=margin), compare_paired(*pair, margin=margin + more)
    order = ["FAIL", "UNDECIDED", "PASS"]
    assert order.index(strict.verdict) <= order.index(generous.verdict)


@given(verdicts(), st.integers(0, 2**32))
def test_the_order_of_images_does_not_matter(pair: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    """The same images in another order give the same comparison."""
    order = np.random.default_rng(seed).permutation(len(pair[0]))
    assert compare_paired(pair[0][order], pair[1][order]) == compare_paired(*pair)
