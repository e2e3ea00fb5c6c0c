"""What a person reads of a run's report."""

from typing import Any

from flows.report import explain_comparison, explain_sanity


def _figures(**outcomes: str) -> dict[str, Any]:
    return {"sanity": [{"name": name.replace("_", "-"), "outcome": outcome} for name, outcome in outcomes.items()]}


def test_failed_and_missing_checks_are_named() -> None:
    """Passed checks are counted; of the others a person learns which they are."""
    real = _figures(logits="passed", inputs="passed")
    mixed = _figures(logits="passed", black_box="failed", gradients="failed", transfer="not run")
    assert explain_sanity({"models": {"real-only": real, "mixed": mixed}}) == (
        "Sanity checks: real-only 2 passed; mixed 1 passed, 2 failed (black-box, gradients), 1 not run (transfer)."
    )


def test_both_intervals_of_a_difference_are_told() -> None:
    """The confidence is that of the comparison, and the bootstrap stands beside the interval that decides."""
    found = {"difference": 0.12, "low": 0.09, "high": 0.15, "confidence": 0.9, "p_value": 0.001, "verdict": "PASS", "n": 100}
    found |= {
        "candidate_only": 14,
        "reference_only": 2,
        "bootstrap": {"low": 0.08, "high": 0.16, "resamples": 10_000, "seed": 0},
    }
    text = explain_comparison({"comparison": {"autoattack": found}, "proxy": "jitter"})
    assert "changes by +12.0 points (90 % interval +9.0 to +15.0, bootstrap +8.0 to +16.0, exact McNemar p = 0.001)" in text
