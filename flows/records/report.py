"""``report.json``: what a run measured, in one file, and the table a person reads."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from flows.plan import Plan, Variant
from flows.records.registry import Registration
from flows.records.versions import library_versions
from proxyrob.certify import CertificationReport
from proxyrob.compare import Comparison, Incomparable
from proxyrob.config.proxy import weighted_parts
from proxyrob.evaluate import FEW_CLASSES, GATE, STANDARD, EvaluationReport, SanityReport
from proxyrob.source import source_report
from proxyrob.storage.bounded import parse_json, read_small
from proxyrob.storage.files import write_json

REPORT = "report.json"
REMEDY = "run again: what is finished is not computed again"
ENSEMBLES = {STANDARD: "AutoAttack", FEW_CLASSES: "few-class AA", GATE: "gate search"}
"""What the table calls them, which has 14 columns for that."""
MEASURED = {
    STANDARD: "AutoAttack accuracy",
    FEW_CLASSES: "Few-class AutoAttack accuracy",
    GATE: "Accuracy under the gate search",
}


def build_report(
    plan: Plan,
    comparison: dict[str, Comparison | Incomparable],
    registration: Registration,
    *,
    preset: str,
    seconds: dict[str, float],
    cached: list[str],
) -> dict[str, Any]:
    """The report of a finished plan. Every figure is read from a stage's own record."""
    config, real = plan.config, source_report(plan.source)
    return {
        "preset": preset,
        "run": plan.run_name,
        "threat": str(config.threat),
        "proxy": config.proxy.kind if config.proxy else None,
        "pgd_steps": config.evaluate.pgd_steps,
        "total_images": {
            "train": real.num_train,
            "synthetic": sum(part.proxy.num_images or 0 for part in weighted_parts(config.proxy)),
            "test": real.num_test,
        },
        "models": {variant: _figures(plan, variant) for variant in plan.variants},
        "comparison": {name: found.model_dump(mode="json") for name, found in comparison.items()},
        "promotion": {
            "verdict": registration.decision.verdict,
            "reasons": list(registration.decision.reasons),
            "reference": registration.decision.reference,
            "failed_checks": list(registration.decision.failed_checks),
            "waived": registration.decision.waived,
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

    Raises ``ValueError`` when there is none, or it cannot be read.
    """
    path = folder / REPORT
    if not path.is_file():
        raise ValueError(f"{folder} holds no {REPORT}; give the output folder of a finished run")
    report = parse_json(read_small(path), str(path), REMEDY)
    if not isinstance(report, dict):
        raise ValueError(f"{path} is no report; {REMEDY}")  # noqa: TRY004  (the content of a file is wrong)
    return report


def render_report(report: dict[str, Any]) -> Group:
    """The table of a run, 80 columns wide, and what its comparison does and does not support."""
    models = report["models"]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for variant in models:
        table.add_column(variant, justify="right", no_wrap=True)
    if report["comparison"]:
        table.add_column("difference", justify="right", no_wrap=True)
        table.add_column("p", justify="right", no_wrap=True, min_width=5)
    for cells in _rows(report):
        table.add_row(*cells)
    any_model = next(iter(models.values()))
    certified, false = any_model["average_certified_radius"]["n"], any_model.get("expected_false_certificates")
    title = (
        f"{report['preset']}, seed {report['seed']}: accuracy in %, threat model {report['threat']}, "
        f"{report['total_images']['test']} test images"
    )
    note = f"Parentheses: 95 % intervals. Certificates (L2 radius) are of the smoothed classifiers, {certified} test images"
    note += "." if false is None else f"; at most {false:g} of them are expected not to hold."
    lines: list[Any] = [Text(title, style="bold"), table, Text(note, style="dim")]
    if "autoattack" in report["comparison"]:
        lines.append(Text("\n" + explain_comparison(report)))
    if "sanity" in any_model:
        lines.append(Text("\n" + explain_sanity(report)))
    promotion, registered = report["promotion"], report["registered"]
    aliases = ", ".join(registered["aliases"]) or "no alias"
    lines.append(
        Text(
            f"\nGate: {promotion['verdict']}. {'; '.join(promotion['reasons'])}.\n"
            f"Registered: {registered['name']} version {registered['version']} ({aliases})."
        )
    )
    return Group(*lines)


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Label, a figure for each model, and where two are compared their difference and its p-value."""
    models, compared = report["models"], report["comparison"]
    ensemble = ENSEMBLES[next(iter(models.values())).get("ensemble", STANDARD)]
    for key, label in {"clean": "clean", "pgd": f"PGD-{report['pgd_steps']}", "autoattack": ensemble}.items():
        yield label, *(_share(figures[key]) for figures in models.values()), *_difference(compared.get(key))
    for radius in next(iter(models.values()))["certified"]:
        figures = (_share(figures["certified"][radius]) for figures in models.values())
        yield f"certified {radius}", *figures, *_difference(compared.get(f"certified_{radius}"))
    for threshold in next(iter(models.values())).get("certified_linf", ()):
        figures = (_share(figures["certified_linf"][threshold]) for figures in models.values())
        yield f"certified L∞ {threshold}", *figures, *_difference(compared.get(f"certified_linf_{threshold}"))
    yield "average radius", *(_radius(figures["average_certified_radius"]) for figures in models.values())


def explain_comparison(report: dict[str, Any]) -> str:
    """In words: what the paired test of the accuracy under all attacks supports, and what it does not."""
    found, any_model = report["comparison"]["autoattack"], next(iter(report["models"].values()))
    measured = MEASURED[any_model.get("ensemble", STANDARD)]
    if "reason" in found:
        return f"{measured} is not compared (UNDECIDED): {found['reason']}."
    low, high = 100 * found["low"], 100 * found["high"]
    resampled = ""
    if (bootstrap := found.get("bootstrap")) is not None:
        resampled = f"bootstrap {100 * bootstrap['low']:+.1f} to {100 * bootstrap['high']:+.1f}, "
    evidence = (
        f"{measured} changes by {100 * found['difference']:+.1f} points ({100 * found['confidence']:g} % interval "
        f"{low:+.1f} to {high:+.1f}, {resampled}exact McNemar p = {found['p_value']:.2g}): mixed alone is right on "
        f"{found['candidate_only']} of {found['n']} images, real-only alone on {found['reference_only']}."
    )
    claim = {
        "PASS": "Supported: of these two networks, the one trained on the mix is more robust.",
        "FAIL": "Supported: of these two networks, the one trained on the mix is less robust.",
        "UNDECIDED": "Not supported: that either of these two networks is more robust than the other.",
    }[found["verdict"]]
    control = (
        ", and whether the generative model or merely more varied images made the difference (run the control: "
        "proxyrob run digits-jitter)"
    )
    return (
        f"{evidence}\n{claim} Not covered: other seeds (repeat with --set seed=1, then proxyrob compare)"
        f"{'' if report['proxy'] == 'jitter' else control}."
    )


def explain_sanity(report: dict[str, Any]) -> str:
    """How many sanity checks of each model passed, failed or were not run, and which."""
    parts = [f"{variant} {count_checks(figures['sanity'])}" for variant, figures in report["models"].items()]
    return f"Sanity checks: {'; '.join(parts)}."


def count_checks(checks: Iterable[dict[str, Any]]) -> str:
    """``15 passed, 1 failed (black-box), 1 not run (transfer)``."""
    named: dict[str, list[str]] = {"passed": [], "failed": [], "not run": []}
    for check in checks:
        named[check["outcome"]].append(check["name"])
    counted = [f"{len(named.pop('passed'))} passed"]
    counted += [f"{len(names)} {outcome} ({', '.join(names)})" for outcome, names in named.items() if names]
    return ", ".join(counted)


def render_markdown(report: dict[str, Any]) -> str:
    """The same table for MLflow's and Prefect's pages."""
    headings = ["", *report["models"], *(["difference", "p"] if report["comparison"] else [])]
    lines = [
        headline(report),
        "",
        f"**{report['preset']}** · {report['threat']} · seed {report['seed']} · accuracy in % (95 % interval)",
        "",
        "| " + " | ".join(headings) + " |",
        "|" + "---|" * len(headings),
        *("| " + " | ".join([*cells, *[""] * (len(headings) - len(cells))]) + " |" for cells in _rows(report)),
        "",
        explain_sanity(report),
        "",
        f"Gate: {'; '.join(report['promotion']['reasons'])}",
    ]
    return "\n".join(lines)


def headline(report: dict[str, Any]) -> str:
    """The result in one line of Markdown."""
    measured = MEASURED[next(iter(report["models"].values())).get("ensemble", STANDARD)]
    figures = " against ".join(
        f"{100 * figures['autoattack']['value']:.1f} % ({name})" for name, figures in reversed(report["models"].items())
    )
    verdict, registered = report["promotion"]["verdict"], report["registered"]
    return f"**Gate: {verdict}** · {measured} {figures} · {registered['name']} version {registered['version']}"


def _figures(plan: Plan, variant: Variant) -> dict[str, Any]:
    stages = plan.variants[variant]
    evaluation, certification = stages.evaluate.finished(EvaluationReport), stages.certify.finished(CertificationReport)
    sanity = stages.sanity.finished(SanityReport)
    assert evaluation is not None
    assert certification is not None
    assert sanity is not None
    return {
        "clean": evaluation.clean.model_dump(),
        "pgd": evaluation.pgd.model_dump(),
        "autoattack": evaluation.autoattack.model_dump(),
        "ensemble": evaluation.ensemble,
        "certified": {radius: share.model_dump() for radius, share in certification.certified.items()},
        "certified_linf": {threshold: share.model_dump() for threshold, share in certification.certified_linf.items()},
        "average_certified_radius": certification.average_certified_radius.model_dump(),
        "abstained": certification.abstained.model_dump(),
        "expected_false_certificates": certification.expected_false_certificates,
        "sanity": [check.model_dump() for check in sanity.checks],
    }


def _share(figure: dict[str, Any]) -> str:
    return f"{100 * figure['value']:.1f} ({100 * figure['low']:.1f}–{100 * figure['high']:.1f})"


def _radius(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.2f} ({figure['low']:.2f}–{figure['high']:.2f})"


def _difference(found: dict[str, Any] | None) -> tuple[str, ...]:
    if found is None:
        return ()
    if "reason" in found:
        return "not compared", ""
    return (
        f"{100 * found['difference']:+.1f} ({100 * found['low']:+.1f}, {100 * found['high']:+.1f})",
        _p_value(found["p_value"]),
    )


def _p_value(p: float) -> str:
    """One digit, in few columns: 0.07, 8e-04, 1e-19."""
    return f"{p:.0e}" if p < 0.001 else f"{p:.1g}"
