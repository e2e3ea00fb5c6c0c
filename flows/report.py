"""``report.json``: what a run measured, in one file, and the table a person reads."""

import json
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from flows.plan import Plan, Variant
from flows.registry import Registration
from flows.tracking import library_versions
from proxyrob.certify import CertificationReport
from proxyrob.compare import Comparison
from proxyrob.evaluate import EvaluationReport
from proxyrob.intervals import Measured
from proxyrob.storage.files import write_json

REPORT = "report.json"


def build_report(
    plan: Plan,
    comparison: dict[str, Comparison],
    registration: Registration,
    *,
    preset: str,
    seconds: dict[str, float],
    cached: list[str],
) -> dict[str, Any]:
    """The report of a finished plan. Every figure is read from a stage's own record."""
    config = plan.config
    return {
        "preset": preset,
        "threat": str(config.threat),
        "total_images": {
            "train": config.source.num_train,
            "synthetic": config.proxy.num_images if config.proxy else 0,
            "test": config.source.num_test,
        },
        "models": {variant: _figures(plan, variant) for variant in plan.variants},
        "comparison": {name: found.model_dump(mode="json") for name, found in comparison.items()},
        "promotion": {
            "verdict": registration.decision.verdict,
            "reasons": list(registration.decision.reasons),
            "reference": registration.decision.reference,
        },
        "registered": {"name": registration.name, "version": registration.version, "aliases": list(registration.aliases)},
        "digests": {"pipeline": plan.digest, "source": plan.source.digest, "export": plan.export.digest},
        "seconds": seconds,
        "cached": cached,
        "versions": library_versions(),
        "seed": config.seed,
    }


def write_report(folder: Path, report: dict[str, Any]) -> Path:
    """Write the report whole."""
    write_json(folder / REPORT, report)
    return folder / REPORT


def read_report(folder: Path) -> dict[str, Any]:
    """Read the report of a run's output folder.

    Raises ``ValueError`` when there is none.
    """
    path = folder / REPORT
    if not path.is_file():
        raise ValueError(f"{folder} holds no {REPORT}; give the output folder of a finished run")
    return json.loads(path.read_text())


def render_report(report: dict[str, Any]) -> Group:
    """The table of a run, and what its comparison does and does not support."""
    models = report["models"]
    table = Table(box=None, padding=(0, 2), header_style="bold", title_justify="left")
    table.add_column(f"{report['preset']}, {report['threat']}, {report['total_images']['test']} test images")
    for variant in models:
        table.add_column(variant, justify="right")
    compared = report["comparison"]
    if compared:
        table.add_column("mixed − real-only", justify="right")
        table.add_column("p", justify="right")
    rows = {"clean": "clean", "pgd": "PGD-20", "autoattack": "AutoAttack standard"}
    for key, label in rows.items():
        table.add_row(label, *(_share(models[variant][key]) for variant in models), *_difference(compared.get(key)))
    first = next(iter(models.values()))
    for radius in first["certified"]:
        table.add_row(
            f"certified at L2 radius {radius}",
            *(_share(models[variant]["certified"][radius]) for variant in models),
            *_difference(compared.get(f"certified_{radius}")),
        )
    table.add_row("average certified radius", *(_radius(models[variant]["average_certified_radius"]) for variant in models))
    lines: list[Any] = [table, Text(f"Brackets: 95 % intervals. Certificates are of the smoothed classifiers, on {first['average_certified_radius']['n']} test images.", style="dim")]
    if "autoattack" in compared:
        lines.append(Text(explain_comparison(report)))
    promotion, registered = report["promotion"], report["registered"]
    aliases = ", ".join(registered["aliases"]) or "no alias"
    lines.append(
        Text(f"\nGate: {promotion['verdict']}. {'; '.join(promotion['reasons'])}.\nRegistered: {registered['name']} version {registered['version']} ({aliases}).")
    )
    return Group(*lines)


def explain_comparison(report: dict[str, Any]) -> str:
    """In words: what the paired test of AutoAttack accuracy supports, and what it does not."""
    found = report["comparison"]["autoattack"]
    low, high = 100 * found["low"], 100 * found["high"]
    evidence = (
        f"AutoAttack accuracy changes by {100 * found['difference']:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}, "
        f"exact McNemar p = {found['p_value']:.2g}): mixed alone is right on {found['candidate_only']} of {found['n']} images, "
        f"real-only alone on {found['reference_only']}."
    )
    claim = {
        "PASS": "Supported: of these two networks, the one trained on the mix is more robust.",
        "FAIL": "Supported: of these two networks, the one trained on the mix is less robust.",
        "UNDECIDED": "Not supported: that either of these two networks is more robust than the other.",
    }[found["verdict"]]
    return (
        f"\n{evidence}\n{claim} Not covered: other seeds (repeat with --set seed=1), and whether the generative model or merely "
        "more varied images made the difference (run the control: proxyrob run digits-jitter)."
    )


def render_markdown(report: dict[str, Any]) -> str:
    """The same table for MLflow's and Prefect's pages."""
    models = report["models"]
    lines = [
        f"**{report['preset']}** · {report['threat']} · seed {report['seed']}",
        "",
        "| " + " | ".join(["", *models, *(["mixed − real-only", "p"] if report["comparison"] else [])]) + " |",
        "|" + "---|" * (1 + len(models) + (2 if report["comparison"] else 0)),
    ]
    for key, label in {"clean": "clean", "pgd": "PGD-20", "autoattack": "AutoAttack standard"}.items():
        cells = [label, *(_share(models[variant][key]) for variant in models), *_difference(report["comparison"].get(key))]
        lines.append("| " + " | ".join(cells) + " |")
    for radius in next(iter(models.values()))["certified"]:
        found = report["comparison"].get(f"certified_{radius}")
        cells = [f"certified at {radius}", *(_share(models[variant]["certified"][radius]) for variant in models), *_difference(found)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Gate: **{report['promotion']['verdict']}**. {'; '.join(report['promotion']['reasons'])}"]
    return "\n".join(lines)


def _figures(plan: Plan, variant: Variant) -> dict[str, Any]:
    stages = plan.variants[variant]
    evaluation, certification = stages.evaluate.finished(EvaluationReport), stages.certify.finished(CertificationReport)
    assert evaluation is not None and certification is not None
    return {
        "clean": evaluation.clean.model_dump(),
        "pgd": evaluation.pgd.model_dump(),
        "autoattack": evaluation.autoattack.model_dump(),
        "certified": {radius: share.model_dump() for radius, share in certification.certified.items()},
        "average_certified_radius": certification.average_certified_radius.model_dump(),
    }


def _share(figure: dict[str, Any]) -> str:
    return str(Measured.model_validate(figure))


def _radius(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _difference(found: dict[str, Any] | None) -> tuple[str, ...]:
    if found is None:
        return ()
    return f"{100 * found['difference']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]", f"{found['p_value']:.2g}"
