"""The verdict table: one row per image, the verdict of every attack. Every accuracy is derived from it, none is typed."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int64

from proxyrob.config.evaluate import EvaluateConfig
from proxyrob.evaluate.adversarial import (
    ADVERSARIAL,
    AdversarialHeader,
    AdversarialImages,
    predict_classes,
    write_adversarial,
)
from proxyrob.evaluate.autoattack import AttackRun, run_autoattack
from proxyrob.evaluate.ensemble import STANDARD, STANDARD_ATTACKS
from proxyrob.evaluate.pgd import PgdRun
from proxyrob.intervals import Measured, measure_share
from proxyrob.models import load_model
from proxyrob.rng import Streams
from proxyrob.source import read_rows, read_split, source_report
from proxyrob.storage import DataPlace, Report, Stage
from proxyrob.storage.files import read_frame, read_header, write_table
from proxyrob.storage.shared import finish_once
from proxyrob.threat import Threat
from proxyrob.types import OnProgress, no_progress

VERDICTS = "verdicts.parquet"


class VerdictHeader(Report):
    """Under which conditions verdicts were found. Verdicts under different ones are not comparable."""

    norm: str
    epsilon: str
    attacks: dict[str, str]
    seed: int
    split: str
    model: str
    data_sha256: str
    subset: str = "all"


class EvaluationReport(Report):
    """The accuracies of a verdict table.

    ``ensemble`` says by which name ``autoattack`` may be called: AutoAttack standard, few-class AutoAttack or gate search.
    ``target_reached`` is ``None`` without a target.
    """

    clean: Measured
    pgd: Measured
    autoattack: Measured
    ensemble: str
    target_reached: bool | None
    broken_by: dict[str, int]


def evaluate_classifier(
    config: EvaluateConfig,
    *,
    source: Stage,
    model: Stage,
    threat: Threat,
    seed: int,
    stage: Stage,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> EvaluationReport:
    """Attack the whole test split with PGD and with AutoAttack, and write ``verdicts.parquet`` and ``adversarial.parquet``.

    ``broken_by`` names the first attack that succeeded, ``clean`` when the unperturbed image is misclassified already,
    in the order clean, AutoAttack's four, PGD. An attack's column is null for images it was not run on. Of each image that
    an attack broke the adversarial image is kept. Any number of workers may do this at once; what is done by (attack, batch)
    units is not done again after a kill.

    Randomness: ``evaluate/pgd`` by image batch; AutoAttack from ``evaluate/autoattack``.
    """
    return finish_once(
        stage,
        EvaluationReport,
        lambda started: _evaluate(config, source, model, threat, seed, stage, device, on_progress, started),
    )


def _evaluate(
    config: EvaluateConfig,
    source: Stage,
    model: Stage,
    threat: Threat,
    seed: int,
    stage: Stage,
    device: str,
    on_progress: OnProgress,
    started: float,
) -> EvaluationReport:
    split, streams = read_split(source, "test"), Streams(seed)
    classifier = load_model(model, device)
    images, labels = split.images, split.targets
    predictions = predict_classes(classifier, images, batch_size=config.batch_size, device=device).numpy()
    pgd = PgdRun(config, classifier, split, predictions == split.labels, threat, streams, stage, device)
    run = run_autoattack(
        classifier,
        images,
        labels,
        threat,
        batch_size=config.batch_size,
        seed=streams.entropy("evaluate/autoattack"),
        units=DataPlace.of(stage.scratch / "autoattack"),
        mode=config.mode,
        target=config.target,
        device=device,
        has_ended=stage.is_whole,
        on_progress=on_progress,
    )
    attacks = {**{name: run.ensemble.describe(name) for name in STANDARD_ATTACKS}, pgd.name: pgd.description}
    header = describe_verdicts(source, model, threat, seed, attacks)
    rows = read_rows(source)
    table = tabulate_verdicts(split.labels, predictions, run.broken, {pgd.name: pgd.broken}, run.attacked, rows=rows)
    report = summarise(table, pgd.name, run.ensemble.name, run.target_reached)
    conclude_evaluation(stage, report, table, header, run, _adversarial_images(table, run, pgd), started)
    return report


def describe_verdicts(source: Stage, model: Stage, threat: Threat, seed: int, attacks: dict[str, str]) -> VerdictHeader:
    """The conditions of verdicts on the test split of ``source``."""
    real = source_report(source)
    return VerdictHeader(
        norm=threat.norm,
        epsilon=str(threat.epsilon),
        attacks=attacks,
        seed=seed,
        split="test",
        model=model.digest,
        data_sha256=real.content_sha256,
        subset=real.subset,
    )


def conclude_evaluation(
    stage: Stage,
    report: Report,
    table: pd.DataFrame,
    header: VerdictHeader,
    run: AttackRun,
    adversarial: Iterable[AdversarialImages],
    started: float,
) -> None:
    """Write verdicts and adversarial images and finish the stage, unless another worker does."""
    channels, height, width = run.image_shape
    kept = AdversarialHeader(
        norm=header.norm,
        epsilon=header.epsilon,
        split=header.split,
        image_shape=(channels, height, width),
        model=header.model,
        data_sha256=header.data_sha256,
    )

    def conclude() -> None:
        write_table(stage.folder / VERDICTS, table, header.model_dump(mode="json"))
        write_adversarial(stage.folder / ADVERSARIAL, adversarial, kept)
        stage.finish(report, [VERDICTS, ADVERSARIAL], started)

    run.work.conclude(conclude)


def tabulate_verdicts(
    labels: np.ndarray,
    predictions: np.ndarray,
    sequential: dict[str, Bool[np.ndarray, " n"]],
    independent: dict[str, Bool[np.ndarray, " n"]],
    attacked: dict[str, Bool[np.ndarray, " n"]] | None = None,
    *,
    rows: Int64[np.ndarray, " n"] | None = None,
) -> pd.DataFrame:
    """Assemble the verdict table. ``rows`` are those of the images in the whole split, where they are some of it.

    ``sequential`` attacks were run one after another on what still stood (their columns are null elsewhere), or on the images
    in ``attacked`` alone; ``independent`` ones on every image that is classified correctly when unperturbed.
    """
    correct = predictions == labels
    standing = correct.copy()
    first = np.full(len(labels), None, dtype=object)
    first[~correct] = "clean"
    columns: dict[str, pd.arrays.BooleanArray] = {}
    for name, hits in sequential.items():
        columns[name] = pd.arrays.BooleanArray(hits & standing, ~(standing if attacked is None else attacked[name]))
        first[standing & hits] = name
        standing &= ~hits
    for name, hits in independent.items():
        columns[name] = pd.arrays.BooleanArray(hits & correct, ~correct)
        first[standing & hits] = name
        standing &= ~hits
    return pd.DataFrame(
        {
            "index": np.arange(len(labels)) if rows is None else rows,
            "label": labels,
            "clean_prediction": predictions,
            "broken_by": first,
            **columns,
        }
    )


def robust_rows(table: pd.DataFrame, attacks: tuple[str, ...]) -> Bool[np.ndarray, " n"]:
    """Which images are classified correctly and withstood all of ``attacks``."""
    rows = (table.clean_prediction == table.label).to_numpy().copy()
    for attack in attacks:
        rows &= ~table[attack].fillna(False).to_numpy(dtype=bool)
    return rows


def summarise(
    table: pd.DataFrame, pgd_name: str, ensemble: str = STANDARD, target_reached: bool | None = None
) -> EvaluationReport:
    """The accuracies of a table, with their 95 % intervals."""

    def share(attacks: tuple[str, ...]) -> Measured:
        return measure_share(int(robust_rows(table, attacks).sum()), len(table))

    counts = table.broken_by.value_counts()
    return EvaluationReport(
        clean=share(()),
        pgd=share((pgd_name,)),
        autoattack=share(STANDARD_ATTACKS),
        ensemble=ensemble,
        target_reached=target_reached,
        broken_by={str(name): int(count) for name, count in sorted(counts.items())},
    )


def read_verdicts(stage: Stage) -> tuple[pd.DataFrame, VerdictHeader]:
    """A finished verdict table and the conditions it was made under, hash checked."""
    path: Path = stage.verified(VERDICTS)
    return read_frame(path, stage.remedy), read_header(path, VerdictHeader, stage.remedy)


def _adversarial_images(table: pd.DataFrame, run: AttackRun, pgd: PgdRun) -> Iterator[AdversarialImages]:
    """One for each image that an attack broke, that of the first attack which did, with its row in the whole split."""
    rows, first = table["index"].to_numpy(), table.broken_by.to_numpy()
    yield from run.adversarial_images(table.label.to_numpy(), rows)
    for part in pgd.adversarial_images():
        chosen = first[part.indices] == pgd.name
        kept = torch.from_numpy(chosen)
        yield AdversarialImages(part.attack, rows[part.indices[chosen]], part.labels[chosen], part.images[kept])
