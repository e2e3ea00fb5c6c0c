"""One measurement of one model outside a pipeline: its card, its output folder, its run in MLflow."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.console import choose_variant, console, find_run, plan_of, print_figures
from flows.measure.images import dataset_of
from flows.measure.subject import Subject, input_of, stage_in
from flows.plan import stage_folder
from flows.records.metrics import certification_metrics, evaluation_metrics
from flows.records.report import count_checks
from flows.records.tracking import Tracker
from flows.settings import Settings
from proxyrob.certify import CertificationReport, read_certificates
from proxyrob.certify.smoothing import CERTIFICATES
from proxyrob.config import BlackBoxConfig, CertifyConfig, EvaluateConfig, flatten
from proxyrob.evaluate import GATE, BlackBoxReport, EvaluationReport, SanityReport, read_verdicts
from proxyrob.evaluate.verdicts import VERDICTS
from proxyrob.export import MEASUREMENT, MEASUREMENT_CARD, Measurement, read_measurement, require_own_folder, write_measurement
from proxyrob.figures.pictures import draw_accuracies, draw_certified_curves
from proxyrob.source import source_report
from proxyrob.storage import Stage
from proxyrob.storage.files import require_writable
from proxyrob.threat import Threat, parse_threat

ACCURACIES, CURVE = "accuracies.png", "certified-accuracy.png"
INTERVALS = "The intervals cover the choice of the images, not another seed of the model's training."


def prepare_folder(output: Path | None, subject: Subject, stage: Stage, settings: Settings) -> Path:
    """The folder of the results: the one that was asked for, or one named after model and measurement.

    Raises ``ValueError`` when it holds something else, and ``OSError`` when it cannot be written.
    """
    slug = re.sub(r"[^\w.]+", "-", subject.title).strip("-")
    folder = settings.measurements / f"{slug}-{stage.digest[:8]}" if output is None else output.absolute()
    require_own_folder(folder, stage.digest)
    require_writable(folder)
    return folder


@dataclass(frozen=True)
class FoundEvaluation:
    """An evaluation that was made before, and the images it was made on."""

    title: str
    evaluation: Stage
    source: Stage
    is_of_run: bool


def find_evaluation(reference: str, variant: str | None, settings: Settings) -> FoundEvaluation:
    """The evaluation of a run's model, or that whose results lie in an output folder.

    Raises ``ValueError`` when there is none.
    """
    path = Path(reference) / MEASUREMENT
    if not path.is_file():
        plan = plan_of(find_run(reference))
        chosen = choose_variant(plan, variant)
        return FoundEvaluation(f"{plan.run_name} · {chosen}", plan.variants[chosen].evaluate, plan.source, is_of_run=True)
    measurement = read_measurement(path)
    evaluation = stage_in(stage_folder(settings.store, "evaluate", measurement.digests["measurement"]), "evaluate")
    source = input_of(evaluation, "images") or input_of(evaluation, "source")
    if source is None:
        raise ValueError(f"the images that {evaluation.folder} was made on are gone; evaluate again")
    return FoundEvaluation(measurement.model, evaluation, source, is_of_run=False)


def describe_evaluation(
    subject: Subject,
    data: Stage,
    stage: Stage,
    threat: Threat,
    report: EvaluationReport | BlackBoxReport,
    sanity: SanityReport,
) -> Measurement:
    """What an evaluation found, under which conditions, and what it does not say."""
    table, header = read_verdicts(stage)
    shares, limits = {"clean": report.clean}, [INTERVALS, f"Nothing is said of perturbations other than {threat}."]
    if isinstance(report, BlackBoxReport):
        shares[report.ensemble] = report.black_box
        limits.insert(0, "No gradient was used: attacks that have gradients may break many more. This is not AutoAttack.")
    else:
        (pgd,) = (name for name in header.attacks if name.startswith("pgd-"))
        shares |= {pgd.upper(): report.pgd, report.ensemble: report.autoattack}
        figure = f"The figure of {report.ensemble} is an upper bound on the true robust accuracy"
        limits.insert(0, f"{figure}, and no AutoAttack's." if report.ensemble == GATE else f"{figure}.")
        if report.target_reached is not None:
            limits.insert(
                0, "The attacks ended early, at a target: images that were not attacked to the end count as standing."
            )
    return Measurement(
        model=subject.title,
        note=subject.note,
        images=_images(data, header.subset, len(table)),
        shares=shares,
        radius=None,
        conditions=(
            f"Threat model {threat}, in pixel units of [0,1]; seed of the attacks {header.seed}",
            *(f"{attack}: {about}" for attack, about in header.attacks.items()),
        ),
        limits=tuple(limits),
        sanity=sanity,
        digests=_digests(subject, data, stage),
    )


def describe_certification(subject: Subject, data: Stage, stage: Stage, report: CertificationReport) -> Measurement:
    """What certificates say, under which conditions, and what they do not."""
    table, header = read_certificates(stage)
    shares = {f"certified at L2 radius {radius}": share for radius, share in report.certified.items()}
    shares |= {f"certified at L∞ {threshold}": share for threshold, share in report.certified_linf.items()}
    return Measurement(
        model=f"{subject.title}, smoothed",
        note=subject.note,
        images=_images(data, header.subset, len(table)),
        shares={**shares, "abstained": report.abstained},
        radius=report.average_certified_radius,
        conditions=(
            f"Randomized smoothing, {header.conditions}, n0 = {header.n0}, α = {header.alpha:g}, method "
            f"{header.method['kind']}; seed {header.seed}",
            f"{report.samples_per_image:,.0f} samples per image",
        ),
        limits=(
            "The certificates are of the smoothed classifier, not of the network it is made of.",
            f"At most {report.expected_false_certificates:g} of {len(table)} certificates are expected not to hold.",
            INTERVALS,
        ),
        sanity=None,
        digests=_digests(subject, data, stage),
    )


def write_outcome(folder: Path, stage: Stage, measurement: Measurement) -> list[Path]:
    """Write table, figure and card; their paths."""
    table, figure = (VERDICTS, ACCURACIES) if stage.name == "evaluate" else (CERTIFICATES, CURVE)
    shutil.copyfile(stage.verified(table), folder / table)
    if stage.name == "evaluate":
        title = f"{measurement.model}\n{parse_threat(stage.configuration['threat']).label}, {measurement.images}"
        draw_accuracies(folder / figure, measurement.shares, title=title)
    else:
        certificates, header = read_certificates(stage)
        draw_certified_curves(
            folder / figure, {measurement.model: certificates}, sigma=header.sigma, conditions=header.conditions
        )
    write_measurement(folder, measurement)
    return [folder / name for name in (table, figure, MEASUREMENT_CARD, MEASUREMENT)]


def print_measurement(title: str, measurement: Measurement, folder: Path, remark: str | None = None) -> None:
    """The figures at the terminal, a remark on them, and where everything lies."""
    print_figures(f"{title} · {measurement.images}", measurement.shares)
    if (radius := measurement.radius) is not None:
        console.print(f"  average certified radius {radius.value:.3f} [{radius.low:.3f}, {radius.high:.3f}]")
    if (sanity := measurement.sanity) is not None:
        console.print(f"  sanity checks: {count_checks(sanity.model_dump()['checks'])}", soft_wrap=True)
        for check in sanity.having("failed"):
            console.print(f"  [red]failed[/] {check.name}: {check.finding}; allowed: {check.threshold}", soft_wrap=True)
    if remark is not None:
        console.print(f"  [dim]{remark}[/]", soft_wrap=True)
    console.print(f"[dim]{measurement.note}\n{folder}[/]", soft_wrap=True)


def track_measurement(
    settings: Settings,
    stage: Stage,
    measurement: Measurement,
    report: EvaluationReport | BlackBoxReport | CertificationReport,
    config: EvaluateConfig | BlackBoxConfig | CertifyConfig,
    files: list[Path],
) -> str:
    """Record a measurement in MLflow; the id of its run."""
    is_certified = isinstance(report, CertificationReport)
    figures = certification_metrics(report) if is_certified else evaluation_metrics(report)
    params: dict[str, Any] = {
        "model": measurement.model,
        "images": measurement.images,
        **{key: value for key, value in stage.configuration.items() if key in {"threat", "sigma", "seed"}},
        **{f"{stage.name}.{key}": value for key, value in flatten(config).items()},
    }
    return Tracker(settings).record_measurement(stage, measurement, figures, params, files)


def _images(data: Stage, subset: str, count: int) -> str:
    return f"{count} test images of {dataset_of(data)} ({subset})"


def _digests(subject: Subject, data: Stage, stage: Stage) -> dict[str, str]:
    return {
        "measurement": stage.digest,
        "model": subject.model.digest,
        "images": data.digest,
        "images (sha256)": source_report(data).content_sha256,
    }
