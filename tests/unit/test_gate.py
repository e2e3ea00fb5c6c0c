"""The gate: whether a challenger may become champion, with the evidence."""

from typing import Any

import numpy as np
import pytest

from proxyrob.compare import Comparison, GateDecision, Verdict, compare_paired, decide_promotion
from proxyrob.config import load_config
from proxyrob.config.evaluate import LONGEST_REASON, CheckName
from proxyrob.evaluate import SanityCheck, SanityReport

FIRST = np.arange(200) < 100


def _comparison(gain: int) -> Comparison:
    """A challenger that is right on ``gain`` images more (or fewer) than its reference, with a margin of two points."""
    return compare_paired(np.arange(200) < 100 + gain, FIRST, margin=0.02)


def _sanity(*failed: CheckName, not_run: tuple[CheckName, ...] = ()) -> SanityReport:
    """A report in which these checks failed and these were not run, and «logits» passed."""
    outcomes: dict[CheckName, Any] = {
        "logits": "passed",
        **dict.fromkeys(failed, "failed"),
        **dict.fromkeys(not_run, "not run"),
    }
    return SanityReport(
        checks=tuple(
            SanityCheck(name=name, outcome=outcome, finding=f"{name} was seen", threshold="none")
            for name, outcome in outcomes.items()
        )
    )


def _decide(comparison: Comparison | None, **values: Any) -> GateDecision:
    given: dict[str, Any] = {
        "reference": "champion v3",
        "parity_passed": True,
        "sanity": _sanity(),
        "waivers": {},
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
        f"Robust accuracy against champion v3: +10.0 points, 95 % interval [{100 * comparison.low:+.1f}, "
        f"{100 * comparison.high:+.1f}] on 200 images; at most 2 points may be lost"
    )


@pytest.mark.parametrize("gain", [20, 0, -4, -30])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"parity_passed": False}, "the exported model does not equal the trained one"),
        ({"sanity": _sanity("gradients")}, "sanity check failed: gradients (gradients was seen; allowed: none)"),
        ({"sanity": _sanity("selection")}, "sanity check failed: selection (selection was seen; allowed: none)"),
    ],
)
def test_a_fault_fails_whatever_the_accuracies_say(gain: int, fault: dict[str, Any], reason: str) -> None:
    """A wrong export or a failed check blocks promotion, and comes first among the reasons."""
    decision = _decide(_comparison(gain), **fault)
    assert (decision.verdict, decision.reasons[0], len(decision.reasons)) == ("FAIL", reason, 2)


def test_every_fault_is_named() -> None:
    """Nobody has to try again to learn of the second fault."""
    decision = _decide(_comparison(20), parity_passed=False, sanity=_sanity("gradients", "inputs"))
    assert len(decision.reasons) == 4
    assert [reason.split(" (")[0] for reason in decision.reasons[1:3]] == [
        "sanity check failed: gradients",
        "sanity check failed: inputs",
    ]
    assert decision.failed_checks == ("gradients", "inputs")


# Waivers


@pytest.mark.parametrize(("gain", "verdict"), [(20, "PASS"), (-4, "UNDECIDED"), (-30, "FAIL")])
def test_a_waived_failure_does_not_fail_and_is_stated(gain: int, verdict: Verdict) -> None:
    """The verdict is that of the comparison again; what was found and why it was let pass stands among the reasons."""
    decision = _decide(_comparison(gain), sanity=_sanity("gradients"), waivers={"gradients": "the model rounds, see the note"})
    assert decision.verdict == verdict
    assert decision.reasons[0] == (
        "sanity check failed: gradients (gradients was seen; allowed: none), waived: the model rounds, see the note"
    )
    assert decision.waived == {"gradients": "the model rounds, see the note"}
    assert decision.failed_checks == ("gradients",)


def test_a_waiver_covers_one_check_alone() -> None:
    """Another failed check, or a wrong export, still blocks promotion."""
    waivers = {"gradients": "known"}
    assert _decide(_comparison(20), sanity=_sanity("gradients", "inputs"), waivers=waivers).verdict == "FAIL"
    assert _decide(_comparison(20), sanity=_sanity("gradients"), waivers=waivers, parity_passed=False).verdict == "FAIL"


def test_a_waiver_without_effect_is_stated() -> None:
    """A check that passed, or was not run, needs no waiver: the decision says so, and lists it as granted but not as used."""
    decision = _decide(_comparison(20), sanity=_sanity(not_run=("transfer",)), waivers={"logits": "a", "transfer": "b"})
    assert decision.verdict == "PASS"
    assert decision.reasons[:-1] == (
        "sanity check not run: transfer (transfer was seen)",
        "waiver without effect: logits did not fail",
        "waiver without effect: transfer did not fail",
    )
    assert (decision.waived, decision.waivers) == ({}, {"logits": "a", "transfer": "b"})


def test_a_check_that_was_not_run_is_stated_and_binds_nothing() -> None:
    """It is no failure, and it is not passed over in silence."""
    decision = _decide(_comparison(20), sanity=_sanity(not_run=("transfer",)))
    assert (decision.verdict, decision.failed_checks) == ("PASS", ())
    assert decision.reasons[0] == "sanity check not run: transfer (transfer was seen)"


def test_a_card_gets_the_verdict_and_every_reason() -> None:
    """One line for each, under a heading with the verdict."""
    decision = _decide(_comparison(20), sanity=_sanity("gradients"), waivers={"gradients": "known"})
    lines = decision.describe().splitlines()
    assert lines[0] == "## The gate says PASS"
    assert lines[1:] == [f"- {reason}" for reason in decision.reasons]


def test_waivers_are_read_from_the_configuration() -> None:
    """By name, in the order of the checks, each reason on one line."""
    changes = ['gate.waivers.transfer="twin too weak"', "gate.waivers.gradients=' rounds\n  its input '"]
    gate = load_config("digits", changes).gate
    assert list(gate.waivers.items()) == [("gradients", "rounds its input"), ("transfer", "twin too weak")]
    assert load_config("digits").gate.waivers == {}
    assert load_config("digits", changes).digest() != load_config("digits").digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gate.waivers.blackbox=why", "gate.waivers: there is no sanity check 'blackbox'; did you mean 'black-box'"),
        ("gate.waivers.parity=why", "there is no sanity check 'parity'.*; checks: inputs, class-count, "),
        ("gate.waivers.inputs='  '", "expected the reason why a failed check 'inputs' is acceptable, in 1 to 300 .* got 0"),
        (f"gate.waivers.inputs={'x' * (LONGEST_REASON + 1)}", "in 1 to 300 characters, got 301"),
        ("gate.waivers.inputs=", "gate.waivers.inputs: Input should be a valid string"),
        ("gate.waivers.inputs=yes", "gate.waivers.inputs: Input should be a valid string"),
    ],
)
def test_waivers_without_check_or_reason_are_refused(change: str, message: str) -> None:
    """An unknown check names the nearest and all there are; an empty, missing or endless reason is none."""
    with pytest.raises(ValueError, match=message):
        load_config("digits", [change])


# Without a comparison


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
    assert _decide(None, incomparable="epsilon", sanity=_sanity("inputs")).verdict == "FAIL"
