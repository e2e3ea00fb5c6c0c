"""Measuring robustness: verdict tables, AutoAttack, adversarial images that are kept, sanity checks."""

from proxyrob.evaluate.adversarial import (
    ADVERSARIAL,
    AdversarialHeader,
    AdversarialImages,
    read_adversarial,
    read_adversarial_header,
)
from proxyrob.evaluate.autoattack import AttackRun, run_autoattack
from proxyrob.evaluate.black_box import BlackBoxReport, evaluate_black_box
from proxyrob.evaluate.checks import SanityCheck, SanityReport
from proxyrob.evaluate.ensemble import BLACK_BOX, FEW_CLASSES, GATE, STANDARD, STANDARD_ATTACKS, Ensemble
from proxyrob.evaluate.fit import Fit, require_fit
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
    "BLACK_BOX",
    "FEW_CLASSES",
    "GATE",
    "STANDARD",
    "STANDARD_ATTACKS",
    "AdversarialHeader",
    "AdversarialImages",
    "AttackRun",
    "BlackBoxReport",
    "Ensemble",
    "EvaluationReport",
    "Fit",
    "ReplayReport",
    "SanityCheck",
    "SanityReport",
    "VerdictHeader",
    "check_sanity",
    "evaluate_black_box",
    "evaluate_classifier",
    "inspect_model",
    "read_adversarial",
    "read_adversarial_header",
    "read_verdicts",
    "replay_adversarial",
    "replay_classifier",
    "require_fit",
    "robust_rows",
    "run_autoattack",
    "tabulate_verdicts",
]
