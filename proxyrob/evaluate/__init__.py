"""Measuring robustness: verdict tables, AutoAttack, sanity checks."""

from proxyrob.evaluate.autoattack import STANDARD_ATTACKS, run_autoattack
from proxyrob.evaluate.sanity import SanityCheck, SanityReport, check_sanity, inspect_model
from proxyrob.evaluate.verdicts import (
    EvaluationReport,
    VerdictHeader,
    evaluate_classifier,
    read_verdicts,
    robust_rows,
    tabulate_verdicts,
)

__all__ = [
    "STANDARD_ATTACKS",
    "EvaluationReport",
    "SanityCheck",
    "SanityReport",
    "VerdictHeader",
    "check_sanity",
    "evaluate_classifier",
    "inspect_model",
    "read_verdicts",
    "robust_rows",
    "run_autoattack",
    "tabulate_verdicts",
]
