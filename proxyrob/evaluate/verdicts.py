"""The verdict table: one row per image, the verdict of every attack. Every accuracy is derived from it, none is typed."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks import Attacked, attack_pgd
from proxyrob.config.evaluate import EvaluateConfig
from proxyrob.device import eval_mode
from proxyrob.evaluate.adversarial import (
    ADVERSARIAL,
    AdversarialHeader,
    AdversarialImages,
    predict_classes,
    read_unit,
    tabulate_unit,
    write_adversarial,
)
from proxyrob.evaluate.autoattack import AttackRun, run_autoattack
from proxyrob.evaluate.binding import describe_inputs
from proxyrob.evaluate.ensemble import STANDARD, STANDARD_ATTACKS
from proxyrob.evaluate.shared import EndedElsewhere, SharedWork
from proxyrob.intervals import Measured, measure_share
from proxyrob.models import load_model
from proxyrob.rng import Streams
from proxyrob.source import Split, read_rows, read_split, source_report
from proxyrob.storage import DataPlace, Report, Stage
from proxyrob.storage.files import read_header, write_table
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
    if (report := stage.finished(EvaluationReport)) is not None:
        return report
    started = time.monotonic()
    try:
        report = _evaluate(config, source, model, threat, seed, stage, device, on_progress, started)
    except (EndedElsewhere, FileNotFoundError):  # the second: another worker finished and cleared the scratch folder just now
        if (report := stage.finished(EvaluationReport)) is None:
            raise
    stage.clear()
    return report


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
    pgd = _PgdRun(config, classifier, split, predictions == split.labels, threat, streams, stage, device)
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
    real = source_report(source)
    header = VerdictHeader(
        norm=threat.norm,
        epsilon=str(threat.epsilon),
        attacks={**{name: run.ensemble.describe(name) for name in STANDARD_ATTACKS}, pgd.name: pgd.description},
        seed=seed,
        split="test",
        model=model.digest,
        data_sha256=real.content_sha256,
        subset=real.subset,
    )
    kept = AdversarialHeader(
        norm=threat.norm,
        epsilon=str(threat.epsilon),
        split="test",
        image_shape=real.image_shape,
        model=model.digest,
        data_sha256=real.content_sha256,
    )
    rows = read_rows(source)
    table = tabulate_verdicts(split.labels, predictions, run.broken, {pgd.name: pgd.broken}, run.attacked, rows=rows)
    report = summarise(table, pgd.name, run.ensemble.name, run.target_reached)

    def conclude() -> None:
        write_table(stage.folder / VERDICTS, table, header.model_dump(mode="json"))
        write_adversarial(stage.folder / ADVERSARIAL, _adversarial_images(table, run, pgd), kept)
        stage.finish(report, [VERDICTS, ADVERSARIAL], started)

    run.work.conclude(conclude)
    return report


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
    return pd.read_parquet(path), VerdictHeader.model_validate(read_header(path))


class _PgdRun:
    """PGD on every image, in units of one batch; ``broken`` are those that are classified correctly when unperturbed."""

    def __init__(
        self,
        config: EvaluateConfig,
        model: nn.Module,
        split: Split,
        correct: Bool[np.ndarray, " n"],
        threat: Threat,
        streams: Streams,
        stage: Stage,
        device: str,
    ) -> None:
        steps, size = config.pgd_steps, config.pgd_relative_step
        self.name = f"pgd-{steps}"
        self.description = f"proxyrob PGD, {steps} steps of {size} epsilon, one uniform start"
        self._split = split
        images, labels = split.images, split.targets
        about = {
            "steps": steps,
            "relative step": size,
            "batch size": config.batch_size,
            **describe_inputs(model, images, labels, threat, streams.entropy("evaluate/pgd")),
        }
        self._work = SharedWork(DataPlace.of(stage.scratch / "pgd"), about, stage.is_whole)
        starts = range(0, len(labels), config.batch_size)
        self._units = {
            f"batch-{k:04d}": np.arange(start, min(start + config.batch_size, len(labels))) for k, start in enumerate(starts)
        }

        def attack_unit(name: str) -> pa.Table:
            rows = self._units[name]
            chosen = torch.from_numpy(rows)
            x, y = images[chosen].to(device), labels[chosen].to(device)
            attacked: Float[Tensor, "b c h w"] = attack_pgd(
                model,
                x,
                lambda logits: F.cross_entropy(logits, y, reduction="sum"),
                threat,
                steps=steps,
                relative_step=size,
                generator=streams.torch("evaluate/pgd", device, batch=int(rows[0])),
            )
            with torch.inference_mode(), eval_mode(model):
                fooled = (model(attacked).argmax(1) != y) & torch.from_numpy(correct[rows]).to(device)
            return tabulate_unit(model, rows, images[chosen], labels[chosen], Attacked(attacked, fooled), threat, self.name)

        self._work.complete(list(self._units), attack_unit)
        self.broken = np.concatenate([self._work.read(name, ["broken"])["broken"].to_numpy() for name in self._units])

    def adversarial_images(self) -> Iterator[AdversarialImages]:
        """Every adversarial image, unit by unit."""
        for name in self._units:
            yield read_unit(self._work.read(name), self.name, self._split.labels, tuple(self._split.images.shape[1:]))


def _adversarial_images(table: pd.DataFrame, run: AttackRun, pgd: _PgdRun) -> Iterator[AdversarialImages]:
    """One for each image that an attack broke, that of the first attack which did, with its row in the whole split."""
    rows, first = table["index"].to_numpy(), table.broken_by.to_numpy()
    yield from run.adversarial_images(table.label.to_numpy(), rows)
    for part in pgd.adversarial_images():
        chosen = first[part.indices] == pgd.name
        kept = torch.from_numpy(chosen)
        yield AdversarialImages(part.attack, rows[part.indices[chosen]], part.labels[chosen], part.images[kept])
