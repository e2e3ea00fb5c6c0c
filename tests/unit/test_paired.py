"""Two models on the same images: difference, interval, exact test, verdict."""

from typing import Any

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from proxyrob.compare import Comparison, Verdict, compare_paired


def _compare(candidate_only: int, reference_only: int, both: int = 100, neither: int = 100, **values: Any) -> Comparison:
    """Two models that differ on as many images as given."""
    counts = [candidate_only, reference_only, both, neither]
    candidate = np.repeat([True, False, True, False], counts)
    reference = np.repeat([False, True, True, False], counts)
    return compare_paired(candidate, reference, **values)


@pytest.mark.parametrize(
    ("candidate_only", "reference_only", "margin", "verdict"),
    [
        (30, 5, 0.0, "PASS"),
        (5, 30, 0.0, "FAIL"),
        (12, 10, 0.0, "UNDECIDED"),
        (0, 0, 0.0, "UNDECIDED"),
        (20, 20, 0.0, "UNDECIDED"),
        (0, 0, 0.05, "PASS"),
        (10, 12, 0.06, "PASS"),
        (10, 12, 0.02, "UNDECIDED"),
        (0, 40, 0.05, "FAIL"),
        (8, 22, 0.05, "UNDECIDED"),
        (5, 30, 0.2, "PASS"),
    ],
)
def test_verdicts(candidate_only: int, reference_only: int, margin: float, verdict: Verdict) -> None:
    """Without margin: better, worse or neither. With one: not worse by as much, worse by more, or not known."""
    assert _compare(candidate_only, reference_only, margin=margin).verdict == verdict


def test_the_figures_are_those_of_the_images() -> None:
    """Difference as a share of all images, and the two counts that carry the evidence."""
    found = _compare(30, 10, both=40, neither=20)
    assert (found.difference, found.n, found.candidate_only, found.reference_only) == (0.2, 100, 30, 10)
    assert (found.margin, found.confidence) == (0.0, 0.95)


def test_the_interval_is_bonett_and_prices() -> None:
    """With one pseudo-image added to each kind of disagreement: (31-11)/102 ± 1.96·√((42/102 - (20/102)²)/102)."""
    found = _compare(30, 10, both=40, neither=20)
    centre, half = 20 / 102, 1.959963985 * ((42 / 102 - (20 / 102) ** 2) / 102) ** 0.5
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))


def test_the_p_value_is_that_of_a_fair_coin() -> None:
    """Nine of ten disagreements in one direction: 2·(1 + 10)/2^10. No disagreement: 1."""
    assert _compare(9, 1).p_value == pytest.approx(22 / 1024)
    assert _compare(1, 9).p_value == pytest.approx(22 / 1024)
    assert _compare(0, 0).p_value == 1.0


def test_agreement_carries_no_evidence_for_the_p_value() -> None:
    """Images on which both are right or both wrong change neither counts nor p."""
    few, many = _compare(9, 1, both=0, neither=5), _compare(9, 1, both=900, neither=90)
    assert (few.p_value, few.candidate_only) == (many.p_value, many.candidate_only)
    assert many.difference < few.difference


def test_pass_needs_both_interval_and_test() -> None:
    """Six to nothing: the interval lies above 0 but p = 0.03 is not below 0.01, so at 99 % nothing is decided."""
    assert _compare(6, 0, both=0, neither=0).verdict == "PASS"
    strict = _compare(6, 0, both=0, neither=0, confidence=0.96)
    assert strict.low > 0
    assert _compare(5, 0, both=0, neither=0).p_value > 0.05
    assert _compare(5, 0, both=0, neither=0).verdict == "UNDECIDED"


def test_a_higher_confidence_gives_a_wider_interval() -> None:
    """The confidence is used for the interval."""
    narrow, wide = _compare(30, 10, confidence=0.8), _compare(30, 10, confidence=0.999)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert (narrow.verdict, wide.verdict) == ("PASS", "UNDECIDED")


def test_different_numbers_of_images_are_refused() -> None:
    """A paired test needs the same images, and at least one. (Here unequal shapes are refused by their types already.)"""
    with pytest.raises(ValueError, match="expected both models on the same images, got 0 and 0"):
        compare_paired(np.ones(0, bool), np.ones(0, bool))
    with pytest.raises((ValueError, TypeCheckError)):
        compare_paired(np.ones(3, bool), np.ones(4, bool))
