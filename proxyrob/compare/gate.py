"""The gate: whether a challenger may become champion, with the evidence."""

import re

from proxyrob.compare.paired import Comparison, Verdict
from proxyrob.storage import Report


class GateDecision(Report):
    """PASS, FAIL or UNDECIDED, why, and what it was decided on (``None``: there was nothing to compare with)."""

    verdict: Verdict
    reasons: tuple[str, ...]
    reference: str
    comparison: Comparison | None


def decide_promotion(
    comparison: Comparison | None,
    *,
    reference: str,
    parity_passed: bool,
    failed_checks: tuple[str, ...],
    selection: str,
    incomparable: str | None = None,
) -> GateDecision:
    """Promote only a model that is not worse than ``reference`` by a paired test, whose export equals it, that passed
    every sanity check, and that was not selected on the test split.

    ``comparison`` is that of AutoAttack verdicts, made with the margin that may be lost; ``None`` with ``incomparable``
    (why) is UNDECIDED, ``None`` without it means a first version, which only the other conditions bind. A failed parity
    or sanity check is FAIL whatever the accuracies say.
    """
    faults = []
    if not parity_passed:
        faults.append("the exported model does not equal the trained one")
    faults += [f"sanity check failed: {name}" for name in failed_checks]
    if re.search(r"\btest\b", selection):
        faults.append(f"the checkpoint was selected on the test split ({selection})")
    verdict: Verdict
    if comparison is not None:
        low, high = 100 * comparison.low, 100 * comparison.high
        evidence = (
            f"AutoAttack accuracy against {reference}: {100 * comparison.difference:+.1f} points, "
            f"{100 * comparison.confidence:g} % interval [{low:+.1f}, {high:+.1f}] on {comparison.n} images; "
            f"at most {100 * comparison.margin:g} points may be lost"
        )
        verdict = comparison.verdict
    elif incomparable is not None:
        evidence, verdict = f"not comparable with {reference}: {incomparable}", "UNDECIDED"
    else:
        evidence, verdict = f"compared with {reference}", "PASS"
    return GateDecision(
        verdict="FAIL" if faults else verdict, reasons=(*faults, evidence), reference=reference, comparison=comparison
    )
