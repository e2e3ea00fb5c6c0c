"""The gate: whether a challenger may become champion, with the evidence."""

from collections.abc import Mapping

from proxyrob.compare.paired import Comparison, Verdict
from proxyrob.config.evaluate import CheckName
from proxyrob.evaluate import SanityReport
from proxyrob.storage import Report


class GateDecision(Report):
    """PASS, FAIL or UNDECIDED, why, and what it was decided on.

    ``comparison`` is ``None`` where there was nothing to compare with. ``waivers`` are all that were granted, each with its
    reason; those of ``failed_checks`` that are not among them are why a verdict is FAIL.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    reference: str
    comparison: Comparison | None
    failed_checks: tuple[CheckName, ...]
    waivers: dict[str, str]

    @property
    def waived(self) -> dict[str, str]:
        """The failed checks that were let pass, with the reasons."""
        return {name: self.waivers[name] for name in self.failed_checks if name in self.waivers}

    @property
    def reason(self) -> str:
        """All reasons in one line."""
        return "; ".join(self.reasons)

    def describe(self) -> str:
        """As a section of a model's card."""
        return "\n".join([f"## The gate says {self.verdict}", *(f"- {reason}" for reason in self.reasons), ""])


def decide_promotion(
    comparison: Comparison | None,
    *,
    reference: str,
    parity_passed: bool,
    sanity: SanityReport,
    waivers: Mapping[str, str],
    incomparable: str | None = None,
) -> GateDecision:
    """Promote only a model that is not worse than ``reference`` by a paired test, whose export equals it and that passed
    every sanity check, or failed only such as ``waivers`` lets pass.

    ``comparison`` is that of the attacks' verdicts, made with the margin that may be lost; ``None`` with ``incomparable``
    (why) is UNDECIDED, ``None`` without it means a first version, which only the other conditions bind. A failed parity
    or sanity check is FAIL whatever the accuracies say. A check that was not run is said to be so, and binds nothing.
    """
    faults, notes = [], []
    if not parity_passed:
        faults.append("the exported model does not equal the trained one")
    for check in sanity.having("failed"):
        found = f"sanity check failed: {check.name} ({check.finding}; allowed: {check.threshold})"
        if check.name in waivers:
            notes.append(f"{found}, waived: {waivers[check.name]}")
        else:
            faults.append(found)
    notes += [f"sanity check not run: {check.name} ({check.finding})" for check in sanity.having("not run")]
    failed: tuple[CheckName, ...] = tuple(check.name for check in sanity.having("failed"))
    notes += [f"waiver without effect: {name} did not fail" for name in waivers if name not in failed]
    verdict: Verdict
    if comparison is not None:
        low, high = 100 * comparison.low, 100 * comparison.high
        evidence = (
            f"Robust accuracy against {reference}: {100 * comparison.difference:+.1f} points, "
            f"{100 * comparison.confidence:g} % interval [{low:+.1f}, {high:+.1f}] on {comparison.n} images; "
            f"at most {100 * comparison.margin:g} points may be lost"
        )
        verdict = comparison.verdict
    elif incomparable is not None:
        evidence, verdict = f"not comparable with {reference}: {incomparable}", "UNDECIDED"
    else:
        evidence, verdict = f"compared with {reference}", "PASS"
    return GateDecision(
        verdict="FAIL" if faults else verdict,
        reasons=(*faults, *notes, evidence),
        reference=reference,
        comparison=comparison,
        failed_checks=failed,
        waivers=dict(waivers),
    )
