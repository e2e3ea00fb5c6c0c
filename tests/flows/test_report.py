"""What a person reads of a run's report."""

from typing import Any

from rich.console import Console

from flows.records.report import explain_comparison, explain_sanity, render_report
from proxyrob.evaluate import FEW_CLASSES, GATE, STANDARD


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
    report = {"comparison": {"autoattack": found}, "proxy": "jitter", "models": {"real-only": {"ensemble": STANDARD}}}
    text = explain_comparison(report)
    assert text.startswith("AutoAttack accuracy changes by +12.0 points")
    assert "changes by +12.0 points (90 % interval +9.0 to +15.0, bootstrap +8.0 to +16.0, exact McNemar p = 0.001)" in text
    assert explain_comparison(report | {"models": {"real-only": {"ensemble": GATE}}}).startswith(
        "Accuracy under the gate search changes by +12.0 points"
    )
    assert explain_comparison(report | {"models": {"real-only": {"ensemble": FEW_CLASSES}}}).startswith("Few-class AutoAttack")


def test_what_was_not_compared_is_told_with_the_reason() -> None:
    """A run whose attacks ended early shows its accuracies, no difference, UNDECIDED and why."""
    share = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100}
    figures = _figures(logits="passed") | {"clean": share, "pgd": share, "autoattack": share, "ensemble": GATE}
    figures |= {"certified": {}, "average_certified_radius": share}
    report: dict[str, Any] = {
        "preset": "digits",
        "seed": 0,
        "threat": "linf:3/20",
        "pgd_steps": 20,
        "proxy": "diffusion",
        "total_images": {"test": 100},
        "models": {"real-only": figures, "mixed": figures},
        "comparison": {"autoattack": {"verdict": "UNDECIDED", "reason": "attacks ended early"}},
        "promotion": {"verdict": "UNDECIDED", "reasons": ["not comparable"]},
        "registered": {"name": "digits-linf", "version": 1, "aliases": []},
    }
    console = Console(width=120)
    with console.capture() as captured:
        console.print(render_report(report))
    printed = captured.get()
    assert "Accuracy under the gate search is not compared (UNDECIDED): attacks ended early." in printed
    assert "not compared" in next(line for line in printed.splitlines() if line.startswith("gate search"))
