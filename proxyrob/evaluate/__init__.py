"""Measuring robustness: verdict tables, AutoAttack, adversarial images that are kept, sanity checks."""

from proxyrob.evaluate.adversarial import (
    ADVERSARIAL,
    AdversarialHeader,
    AdversarialImages,
    read_adversarial,
    read_adversarial_header,
)
from proxyrob.evaluate.autoattack import AttackRun, run_autoattack
from proxyrob.evaluate.checks import SanityCheck, SanityReport
from proxyrob.evaluate.ensemble import FEW_CLASSES, GATE, STANDARD, STANDARD_ATTACKS, Ensemble
from proxyrob.evaluate.masking import inspect_model
from proxyrob.evaluate.replay import ReplayReport, replay_adversarial, replay_classifier
from proxyrob.evaluate.sanity import check_sanity
from proxyrob.evaluate.verdicts import (
    EvaluationReport,
    VerdictHeader,
    evaluate_classifier,
    read_verdicts,
    robust_rows,
    tabulate_verdicts,
)

__all__ = [
    "ADVERSARIAL",
    "FEW_CLASSES",
    "GATE",
    "STANDARD",
    "STANDARD_ATTACKS",
    "AdversarialHeader",
    "AdversarialImages",
    "AttackRun",
    "Ensemble",
    "EvaluationReport",
    "ReplayReport",
    "SanityCheck",
    "SanityReport",
    "VerdictHeader",
    "check_sanity",
    "evaluate_classifier",
    "inspect_model",
    "read_adversarial",
    "read_adversarial_header",
    "read_verdicts",
    "replay_adversarial",
    "replay_classifier",
    "robust_rows",
    "run_autoattack",
    "tabulate_verdicts",
]
