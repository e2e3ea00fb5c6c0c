"""Attacking a model whose gradients nobody has, such as an ONNX file: a search by its logits alone, never called AutoAttack."""

from proxyrob.config.evaluate import BlackBoxConfig
from proxyrob.evaluate.adversarial import predict_classes
from proxyrob.evaluate.autoattack import run_autoattack
from proxyrob.evaluate.verdicts import (
    conclude_evaluation,
    describe_verdicts,
    robust_rows,
    tabulate_verdicts,
)
from proxyrob.intervals import Measured, measure_share
from proxyrob.models import load_model
from proxyrob.rng import Streams
from proxyrob.source import read_rows, read_split
from proxyrob.storage import DataPlace, Report, Stage
from proxyrob.storage.shared import finish_once
from proxyrob.threat import Threat
from proxyrob.types import OnProgress, no_progress


class BlackBoxReport(Report):
    """The accuracies of a verdict table that has one attack, Square; where gradients are not known, it is an upper bound
    that may be far from the truth."""

    clean: Measured
    black_box: Measured
    ensemble: str
    broken_by: dict[str, int]


def evaluate_black_box(
    config: BlackBoxConfig,
    *,
    source: Stage,
    model: Stage,
    threat: Threat,
    seed: int,
    stage: Stage,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> BlackBoxReport:
    """Attack the whole test split with Square and write ``verdicts.parquet`` and ``adversarial.parquet``, as
    ``evaluate_classifier`` does with more attacks.

    Randomness: that of AutoAttack's Square, from ``evaluate/autoattack``.
    """
    return finish_once(
        stage,
        BlackBoxReport,
        lambda started: _evaluate(config, source, model, threat, seed, stage, device, on_progress, started),
    )


def _evaluate(
    config: BlackBoxConfig,
    source: Stage,
    model: Stage,
    threat: Threat,
    seed: int,
    stage: Stage,
    device: str,
    on_progress: OnProgress,
    started: float,
) -> BlackBoxReport:
    split, rows = read_split(source, "test"), read_rows(source)
    classifier = load_model(model, device)
    predictions = predict_classes(classifier, split.images, batch_size=config.batch_size, device=device).numpy()
    run = run_autoattack(
        classifier,
        split.images,
        split.targets,
        threat,
        batch_size=config.batch_size,
        seed=Streams(seed).entropy("evaluate/autoattack"),
        units=DataPlace.of(stage.scratch / "black-box"),
        mode="black-box",
        device=device,
        has_ended=stage.is_whole,
        on_progress=on_progress,
    )
    attacks = {name: run.ensemble.describe(name) for name in run.ensemble.attacks}
    header = describe_verdicts(source, model, threat, seed, attacks)
    table = tabulate_verdicts(split.labels, predictions, run.broken, {}, run.attacked, rows=rows)
    counts = table.broken_by.value_counts()
    report = BlackBoxReport(
        clean=measure_share(int(robust_rows(table, ()).sum()), len(table)),
        black_box=measure_share(int(robust_rows(table, run.ensemble.attacks).sum()), len(table)),
        ensemble=run.ensemble.name,
        broken_by={str(name): int(count) for name, count in sorted(counts.items())},
    )
    conclude_evaluation(stage, report, table, header, run, run.adversarial_images(split.labels, rows), started)
    return report
