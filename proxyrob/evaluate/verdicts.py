"""The verdict table: one row per image, the verdict of every attack. Every accuracy is derived from it, none is typed."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks import attack_pgd
from proxyrob.config.evaluate import EvaluateConfig
from proxyrob.device import eval_mode
from proxyrob.evaluate.autoattack import STANDARD_ATTACKS, autoattack_version, run_autoattack
from proxyrob.intervals import Measured, measure_share
from proxyrob.models import load_classifier
from proxyrob.rng import Streams
from proxyrob.source import Split, read_split, source_report
from proxyrob.storage import Report, Stage
from proxyrob.storage.files import read_header, run_units, write_table
from proxyrob.threat import Threat
from proxyrob.types import OnProgress, no_progress

VERDICTS = "verdicts.parquet"
AUTOATTACK_SHARE = 0.95
"""Share of the stage's progress bar that AutoAttack takes; it is nearly all of the time."""


class VerdictHeader(Report):
    """Under which conditions verdicts were found. Verdicts under different ones are not comparable."""

    norm: str
    epsilon: str
    attacks: dict[str, str]
    seed: int
    split: str
    model: str
    data_sha256: str


class EvaluationReport(Report):
    """The accuracies of a verdict table."""

    clean: Measured
    pgd: Measured
    autoattack: Measured
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
    """Attack the whole test split with PGD and with AutoAttack standard, and write ``verdicts.parquet``.

    ``broken_by`` names the first attack that succeeded, ``clean`` when the unperturbed image is misclassified already,
    in the order clean, AutoAttack's four, PGD. An attack's column is null for images it was not run on. Goes on after a
    kill from the last finished (attack, batch) unit.

    Randomness: ``evaluate/pgd`` by image batch; AutoAttack from ``evaluate/autoattack``.
    """
    if (report := stage.finished(EvaluationReport)) is not None:
        return report
    started = time.monotonic()
    streams = Streams(seed)
    split = read_split(source, "test")
    classifier = load_classifier(model, device)
    images, labels = split.images, split.targets
    with torch.inference_mode():
        predictions = torch.cat([classifier(batch.to(device)).argmax(1).cpu() for batch in images.split(config.batch_size)])
    pgd_name = f"pgd-{config.pgd_steps}"
    pgd = _run_pgd(config, classifier, split, threat, streams, stage, device)
    broken = run_autoattack(
        classifier,
        images,
        labels,
        threat,
        batch_size=config.batch_size,
        seed=streams.entropy("evaluate/autoattack"),
        stage=stage,
        device=device,
        on_progress=on_progress,
    )
    header = VerdictHeader(
        norm=threat.norm,
        epsilon=str(threat.epsilon),
        attacks={
            **{name: autoattack_version() for name in STANDARD_ATTACKS},
            pgd_name: f"proxyrob PGD, {config.pgd_steps} steps of {config.pgd_relative_step} epsilon, one uniform start",
        },
        seed=seed,
        split="test",
        model=model.digest,
        data_sha256=source_report(source).content_sha256,
    )
    table = tabulate_verdicts(labels.numpy(), predictions.numpy(), broken, {pgd_name: pgd})
    write_table(stage.folder / VERDICTS, table, header.model_dump(mode="json"))
    stage.finish(report := summarise(table, pgd_name), [VERDICTS], started)
    stage.clear()
    return report


def tabulate_verdicts(
    labels: np.ndarray,
    predictions: np.ndarray,
    sequential: dict[str, Bool[np.ndarray, " n"]],
    independent: dict[str, Bool[np.ndarray, " n"]],
) -> pd.DataFrame:
    """Assemble the verdict table.

    ``sequential`` attacks were run one after another on what still stood (their columns are null elsewhere);
    ``independent`` ones on every image that is classified correctly when unperturbed.
    """
    correct = predictions == labels
    standing = correct.copy()
    first = np.full(len(labels), None, dtype=object)
    first[~correct] = "clean"
    columns: dict[str, pd.arrays.BooleanArray] = {}
    for name, hits in sequential.items():
        columns[name] = pd.arrays.BooleanArray(hits & standing, ~standing)
        first[standing & hits] = name
        standing &= ~hits
    for name, hits in independent.items():
        columns[name] = pd.arrays.BooleanArray(hits & correct, ~correct)
        first[standing & hits] = name
        standing &= ~hits
    return pd.DataFrame(
        {"index": np.arange(len(labels)), "label": labels, "clean_prediction": predictions, "broken_by": first, **columns}
    )


def robust_rows(table: pd.DataFrame, attacks: tuple[str, ...]) -> Bool[np.ndarray, " n"]:
    """Which images are classified correctly and withstood all of ``attacks``."""
    rows = (table.clean_prediction == table.label).to_numpy().copy()
    for attack in attacks:
        rows &= ~table[attack].fillna(False).to_numpy(dtype=bool)
    return rows


def summarise(table: pd.DataFrame, pgd_name: str) -> EvaluationReport:
    """The accuracies of a table, with their 95 % intervals."""

    def share(attacks: tuple[str, ...]) -> Measured:
        return measure_share(int(robust_rows(table, attacks).sum()), len(table))

    counts = table.broken_by.value_counts()
    return EvaluationReport(
        clean=share(()),
        pgd=share((pgd_name,)),
        autoattack=share(STANDARD_ATTACKS),
        broken_by={str(name): int(count) for name, count in sorted(counts.items())},
    )


def read_verdicts(stage: Stage) -> tuple[pd.DataFrame, VerdictHeader]:
    """A finished verdict table and the conditions it was made under, hash checked."""
    path: Path = stage.verified(VERDICTS)
    return pd.read_parquet(path), VerdictHeader.model_validate(read_header(path))


def _run_pgd(
    config: EvaluateConfig, model: nn.Module, split: Split, threat: Threat, streams: Streams, stage: Stage, device: str
) -> Bool[np.ndarray, " n"]:
    images, labels = split.images, split.targets
    units = {
        f"batch-{k:04d}": slice(start, start + config.batch_size)
        for k, start in enumerate(range(0, len(labels), config.batch_size))
    }

    def attack_one(name: str) -> pd.DataFrame:
        x, y = images[units[name]].to(device), labels[units[name]].to(device)
        generator = streams.torch("evaluate/pgd", device, batch=units[name].start)
        attacked: Float[Tensor, "b c h w"] = attack_pgd(
            model,
            x,
            lambda logits: F.cross_entropy(logits, y, reduction="sum"),
            threat,
            steps=config.pgd_steps,
            relative_step=config.pgd_relative_step,
            generator=generator,
        )
        with torch.inference_mode(), eval_mode(model):
            return pd.DataFrame({"broken": (model(attacked).argmax(1) != y).cpu().numpy()})

    return run_units(stage.scratch / "pgd", list(units), attack_one).broken.to_numpy()
