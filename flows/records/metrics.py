"""Figures by the names under which MLflow has them, each with its 95 % interval."""

from collections.abc import Mapping

from flows.plan import Plan, Variant
from proxyrob.certify import CertificationReport
from proxyrob.evaluate import GATE, BlackBoxReport, EvaluationReport
from proxyrob.intervals import Measured


def name_figures(measured: Mapping[str, Measured]) -> dict[str, float]:
    """``name``, ``name_low`` and ``name_high`` of every figure."""
    return {
        f"{name}{end}": value
        for name, figure in measured.items()
        for end, value in (("", figure.value), ("_low", figure.low), ("_high", figure.high))
    }


def evaluation_metrics(report: EvaluationReport | BlackBoxReport) -> dict[str, float]:
    """The accuracies of an evaluation. What is not AutoAttack is not named after it."""
    if isinstance(report, BlackBoxReport):
        return name_figures({"clean_accuracy": report.clean, "black_box_accuracy": report.black_box})
    robust = "gate_search_accuracy" if report.ensemble == GATE else "autoattack_accuracy"
    return name_figures({"clean_accuracy": report.clean, "pgd_accuracy": report.pgd, robust: report.autoattack})


def certification_metrics(report: CertificationReport) -> dict[str, float]:
    """The figures of certificates."""
    measured = {
        "average_certified_radius": report.average_certified_radius,
        "abstained": report.abstained,
        **{f"certified_accuracy_{radius}": share for radius, share in report.certified.items()},
        **{f"certified_accuracy_linf_{threshold}": share for threshold, share in report.certified_linf.items()},
    }
    return name_figures(measured) | {
        "expected_false_certificates": report.expected_false_certificates,
        "samples_per_certificate": report.samples_per_image,
    }


def variant_metrics(plan: Plan, variant: Variant) -> dict[str, float]:
    """The accuracies of a variant of a finished plan."""
    stages = plan.variants[variant]
    evaluation, certification = stages.evaluate.finished(EvaluationReport), stages.certify.finished(CertificationReport)
    assert evaluation is not None
    assert certification is not None
    return evaluation_metrics(evaluation) | certification_metrics(certification)
