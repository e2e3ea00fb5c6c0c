"""Attacking a model whose gradients nobody has, such as an ONNX file: a search by its logits alone, never called AutoAttack."""

import time

from proxyrob.config.evaluate import BlackBoxConfig
from proxyrob.evaluate.adversarial import ADVERSARIAL, AdversarialHeader, predict_classes, write_adversarial
from proxyrob.evaluate.autoattack import run_autoattack
from proxyrob.evaluate.shared import EndedElsewhere
from proxyrob.evaluate.verdicts import (
    VERDICTS,
    VerdictHeader,
    robust_rows,
    tabulate_verdicts,
)
from proxyrob.intervals import Measured, measure_share
from proxyrob.models import load_model
from proxyrob.rng import Streams
from proxyrob.source import read_rows, read_split, source_report
from proxyrob.storage import DataPlace, Report, Stage
from proxyrob.storage.files import write_table
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
    if (report := stage.finished(BlackBoxReport)) is not None:
        return report
    started = time.monotonic()
    split, real, rows = read_split(source, "test"), source_report(source), read_rows(source)
    classifier = load_model(model, device)
    predictions = predict_classes(classifier, split.images, batch_size=config.batch_size, device=device).numpy()
    try:
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
        conditions = {"norm": threat.norm, "epsilon": str(threat.epsilon), "split": "test", "model": model.digest}
        header = VerdictHeader.model_validate(
            {
                **conditions,
                "attacks": {name: run.ensemble.describe(name) for name in run.ensemble.attacks},
                "seed": seed,
                "data_sha256": real.content_sha256,
                "subset": real.subset,
            }
        )
        kept = AdversarialHeader.model_validate(
            {**conditions, "image_shape": real.image_shape, "data_sha256": real.content_sha256}
        )
        table = tabulate_verdicts(split.labels, predictions, run.broken, {}, run.attacked, rows=rows)
        counts = table.broken_by.value_counts()
        found = report = BlackBoxReport(
            clean=measure_share(int(robust_rows(table, ()).sum()), len(table)),
            black_box=measure_share(int(robust_rows(table, run.ensemble.attacks).sum()), len(table)),
            ensemble=run.ensemble.name,
            broken_by={str(name): int(count) for name, count in sorted(counts.items())},
        )

        def conclude() -> None:
            write_table(stage.folder / VERDICTS, table, header.model_dump(mode="json"))
            write_adversarial(stage.folder / ADVERSARIAL, run.adversarial_images(split.labels, rows), kept)
            stage.finish(found, [VERDICTS, ADVERSARIAL], started)

        run.work.conclude(conclude)
    except (EndedElsewhere, FileNotFoundError):  # the second: another worker finished and cleared the scratch folder just now
        if (report := stage.finished(BlackBoxReport)) is None:
            raise
    stage.clear()
    return report
