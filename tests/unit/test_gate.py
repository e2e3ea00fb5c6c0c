"""The gate: whether a challenger may become champion, with the evidence."""

from typing import Any

import numpy as np
import pytest

from proxyrob.compare import Comparison, GateDecision, Verdict, compare_paired, decide_promotion

FIRST = np.arange(200) < 100


def _comparison(gain: int) -> Comparison:
    """A challenger that is right on ``gain`` images more (or fewer) than its reference, with a margin of two points."""
    return compare_paired(np.arange(200) < 100 + gain, FIRST, margin=0.02)


def _decide(comparison: Comparison | None, **values: Any) -> GateDecision:
    given: dict[str, Any] = {
        "reference": "champion v3",
        "parity_passed": True,
        "failed_checks": (),
        "selection": "last step",
        **values,
    }
    return decide_promotion(comparison, **given)


@pytest.mark.parametrize(("gain", "verdict"), [(20, "PASS"), (0, "PASS"), (-4, "UNDECIDED"), (-30, "FAIL")])
def test_a_sound_model_is_judged_by_the_comparison(gain: int, verdict: Verdict) -> None:
    """Without faults the verdict is that of the paired test, and the comparison is kept as evidence."""
    comparison = _comparison(gain)
    decision = _decide(comparison)
    assert (comparison.verdict, decision.verdict) == (verdict, verdict)
    assert (decision.comparison, decision.reference, len(decision.reasons)) == (comparison, "champion v3", 1)


def test_the_reason_states_difference_interval_images_and_margin() -> None:
    """What a person reads is enough to judge the verdict."""
    comparison = _comparison(20)
    (reason,) = _decide(comparison).reasons
    assert reason == (
        f"AutoAttack accuracy against champion v3: +10.0 points, 95 % interval [{100 * comparison.low:+.1f}, "
        f"{100 * comparison.high:+.1f}] on 200 images; at most 2 points may be lost"
    )


@pytest.mark.parametrize("gain", [20, 0, -4, -30])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"parity_passed": False}, "the exported model does not equal the trained one"),
        ({"failed_checks": ("gradients reach the image",)}, "sanity check failed: gradients reach the image"),
        ({"selection": "best on test"}, "the checkpoint was selected on the test split (best on test)"),
    ],
)
def test_a_fault_fails_whatever_the_accuracies_say(gain: int, fault: dict[str, Any], reason: str) -> None:
    """A wrong export, a failed check or a choice on the test split blocks promotion, and comes first among the reasons."""
    decision = _decide(_comparison(gain), **fault)
    assert (decision.verdict, decision.reasons[0], len(decision.reasons)) == ("FAIL", reason, 2)


def test_every_fault_is_named() -> None:
    """Nobody has to try again to learn of the second fault."""
    decision = _decide(_comparison(20), parity_passed=False, failed_checks=("a", "b"), selection="test")
    assert len(decision.reasons) == 5
    assert decision.reasons[1:3] == ("sanity check failed: a", "sanity check failed: b")


@pytest.mark.parametrize("selection", ["last step", "best on validation", "latest checkpoint", "greatest margin on validation"])
def test_a_selection_that_did_not_use_the_test_split_is_no_fault(selection: str) -> None:
    """«latest» and «greatest» are not the test split, though their letters contain it."""
    assert _decide(_comparison(20), selection=selection).verdict == "PASS"


def test_a_first_version_is_bound_by_the_other_conditions_alone() -> None:
    """With nothing to compare with, a sound model passes and an unsound one fails."""
    assert _decide(None).verdict == "PASS"
    assert _decide(None).comparison is None
    assert _decide(None, parity_passed=False).verdict == "FAIL"


def test_what_cannot_be_compared_is_undecided() -> None:
    """A champion under another threat model says nothing of this one: a person has to decide."""
    decision = _decide(None, incomparable="epsilon is 8/255 and 4/255")
    assert (decision.verdict, decision.reasons) == (
        "UNDECIDED",
        ("not comparable with champion v3: epsilon is 8/255 and 4/255",),
    )
    assert _decide(None, incomparable="epsilon", failed_checks=("a",)).verdict == "FAIL"
