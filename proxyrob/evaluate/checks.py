"""What a sanity check says: its outcome, what was found, and what would have been allowed."""

from typing import Literal

from proxyrob.config.evaluate import CheckName
from proxyrob.storage import Report

Outcome = Literal["passed", "failed", "not run"]


class SanityCheck(Report):
    """One check. ``finding`` states what was found, with its numbers, or why the check was not run."""

    name: CheckName
    outcome: Outcome
    finding: str
    threshold: str


class SanityReport(Report):
    """All checks of one model. A check that was not run is neither passed nor failed."""

    checks: tuple[SanityCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.having("failed")

    def having(self, outcome: Outcome) -> tuple[SanityCheck, ...]:
        """The checks with this outcome, in order."""
        return tuple(check for check in self.checks if check.outcome == outcome)


def judge(name: CheckName, passed: bool, finding: str, threshold: str) -> SanityCheck:
    """A check that was made."""
    return SanityCheck(name=name, outcome="passed" if passed else "failed", finding=finding, threshold=threshold)


def not_run(name: CheckName, reason: str, threshold: str) -> SanityCheck:
    """A check that could not be made."""
    return SanityCheck(name=name, outcome="not run", finding=reason, threshold=threshold)
