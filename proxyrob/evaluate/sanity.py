"""The sanity checks of an evaluation: does its robust accuracy mean what it says? A failed one blocks promotion."""

import time
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from proxyrob.attacks import margins
from proxyrob.errors import DataIntegrityError
from proxyrob.evaluate.checks import SanityCheck, SanityReport, judge, not_run
from proxyrob.evaluate.masking import (
    CURVE_SHARES,
    NO_GRADIENTS,
    RESTARTS,
    attack_again,
    attack_through_twin,
    inspect_model,
)
from proxyrob.evaluate.verdicts import read_verdicts, robust_rows
from proxyrob.label import LabelReport
from proxyrob.models import in_pieces, is_given, load_model
from proxyrob.rng import Streams
from proxyrob.source import Split, read_split, source_report
from proxyrob.storage import Report, Stage
from proxyrob.threat import parse_threat
from proxyrob.train import TrainReport
from proxyrob.types import OnProgress, no_progress

R = TypeVar("R", bound=Report)

NUM_IMAGES = 128
NUM_WEIGHED = 512
NUM_ATTACKED = 64
"""Of the first 512 images that withstood every attack, the 64 of smallest margin are attacked again: if more of the same
helps, it helps on those."""

OFF_GRID = 1e-3
"""In levels of 255: float32 rounding of an 8-bit image."""

BLACK_BOX_SHARE = 0.002
FEWEST_BLACK_BOX = 2
"""AutoAttack's own check suspects an evaluation where Square lowers the accuracy by more than 0.2 points; of few images two
may be broken by chance."""

NEAR_TEST_SHARE = 0.001
"""A generator that saw training images alone copies a test image by chance, which in our runs it never did. A tenth of the
share from which on a set is refused altogether (``proxyrob.label``)."""

NEAR_TEST = f"at most {100 * NEAR_TEST_SHARE:g} %"
UNKNOWN_TRAINING = "how the model was trained is not known"


def check_sanity(
    *,
    source: Stage,
    model: Stage,
    evaluation: Stage,
    twin: Stage | None,
    labels: Sequence[Stage],
    seed: int,
    stage: Stage,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> SanityReport:
    """Run every check: on the first 128 test images, on the 64 likeliest to fall of those that withstood every attack, on the
    verdict table and on the records of the stages that the model came from.

    ``twin`` is the training of another model of the same data, ``labels`` are the stages that labelled the synthetic images
    of the training, none where there were none. Of a model from elsewhere nobody knows what it was trained on, and how its
    weights were chosen: those checks are not run. Nor are, without gradients, those that need them.

    Randomness: ``evaluate/sanity``, ``evaluate/again``, ``evaluate/transfer``.
    """
    if (report := stage.finished(SanityReport)) is not None:
        return report
    started, streams = time.monotonic(), Streams(seed)
    split = read_split(source, "test")
    first = split.first(NUM_IMAGES)
    classifier = in_pieces(load_model(model, device))
    table, header = read_verdicts(evaluation)
    pgd_name = next((name for name in header.attacks if name.startswith("pgd-")), None)
    threat = parse_threat(f"{header.norm}:{header.epsilon}")
    length = len(CURVE_SHARES) + RESTARTS
    checks = [
        _check_inputs(first.images),
        *inspect_model(
            classifier,
            first.images.to(device),
            first.targets.to(device),
            num_classes=len(source_report(source).class_names),
            norm=threat.norm,
            generator=streams.torch("evaluate/sanity", device),
            on_progress=lambda done, total, **figures: on_progress(done, length),
        ),
    ]
    images, targets = _likeliest_to_fall(classifier, split, np.flatnonzero(withstood(table, tuple(header.attacks))), device)
    checks.append(
        attack_again(
            classifier,
            images,
            targets,
            threat,
            steps=0 if pgd_name is None else int(pgd_name.removeprefix("pgd-")),  # without gradients none are made
            generator=streams.torch("evaluate/again", device),
            on_progress=lambda done, total, **figures: on_progress(len(CURVE_SHARES) + done, length),
        )
    )
    other = None if twin is None else in_pieces(load_model(twin, device))
    generator = streams.torch("evaluate/transfer", device)
    checks += [
        attack_through_twin(classifier, other, images, targets, threat, generator=generator),
        _check_ensemble(table, tuple(name for name in header.attacks if name != pgd_name), pgd_name),
        _check_black_box(table, alone=pgd_name is None),
        not_run("near-duplicates", UNKNOWN_TRAINING, NEAR_TEST) if is_given(model) else _check_near_duplicates(labels),
        _check_selection(model),
    ]
    return stage.finish(SanityReport(checks=tuple(checks)), [], started)


def _check_inputs(images: Float[Tensor, "n c h w"]) -> SanityCheck:
    off_grid = float((images * 255.0 - (images * 255.0).round()).abs().max())
    least, most = float(images.min()), float(images.max())
    return judge(
        "inputs",
        least >= 0.0 and most <= 1.0 and off_grid <= OFF_GRID,
        f"range [{least:.3f}, {most:.3f}], at most {off_grid:.1e} of a level off the 8-bit grid",
        f"in [0,1], at most {OFF_GRID:g} of a level off",
    )


def withstood(table: pd.DataFrame, attacks: tuple[str, ...]) -> Bool[np.ndarray, " n"]:
    """Which images stand after every attack: where the attacks ended early, some stand because they were not attacked."""
    return (table.broken_by.isna() & table[list(attacks)].notna().all(axis=1)).to_numpy(dtype=bool)


def _likeliest_to_fall(
    model: nn.Module, split: Split, rows: Int64[np.ndarray, " k"], device: str
) -> tuple[Float[Tensor, "m c h w"], Int64[Tensor, " m"]]:
    """Of the first of ``rows`` those images that have the smallest margin, and their labels."""
    rows = rows[:NUM_WEIGHED]
    standing = Split(split.stored[rows], split.labels[rows])
    images, labels = standing.images.to(device), standing.targets.to(device)
    with torch.no_grad():
        found = [margins(model(x), y) for x, y in zip(images.split(NUM_IMAGES), labels.split(NUM_IMAGES), strict=True)]
    chosen = torch.cat(found).argsort(descending=True)[:NUM_ATTACKED] if found else labels
    return images[chosen], labels[chosen]


def _check_ensemble(table: pd.DataFrame, ensemble: tuple[str, ...], pgd_name: str | None) -> SanityCheck:
    threshold = "together they break at least as many"
    if pgd_name is None:
        return not_run("ensemble", NO_GRADIENTS, threshold)
    if spared := _spared(table, ensemble):
        return not_run("ensemble", spared, threshold)
    withstand, weaker = (int(robust_rows(table, attacks).sum()) for attacks in (ensemble, (pgd_name,)))
    return judge(
        "ensemble",
        withstand <= weaker,
        f"{withstand} of {len(table)} images withstand {', '.join(ensemble)}; {weaker} withstand {pgd_name}",
        threshold,
    )


def _check_black_box(table: pd.DataFrame, *, alone: bool = False) -> SanityCheck:
    threshold = f"at most {100 * BLACK_BOX_SHARE:g} %, or {FEWEST_BLACK_BOX} images"
    if alone:
        return not_run("black-box", NO_GRADIENTS, threshold)
    if spared := _spared(table, ("square",)):
        return not_run("black-box", spared, threshold)
    broken = int((table.broken_by == "square").sum())
    return judge(
        "black-box",
        broken <= max(FEWEST_BLACK_BOX, BLACK_BOX_SHARE * len(table)),
        f"{broken} of {len(table)} images fall to Square and to no gradient",
        threshold,
    )


def _spared(table: pd.DataFrame, attacks: tuple[str, ...]) -> str:
    """Says how many images stand that not all of ``attacks`` were run on; empty where there are none."""
    count = int((table.broken_by.isna() & ~withstood(table, attacks)).sum())
    return f"{count} of {len(table)} images stand that were not attacked by {', '.join(attacks)}" if count else ""


def _check_near_duplicates(labels: Sequence[Stage]) -> SanityCheck:
    reports = [_finished(stage, LabelReport) for stage in labels]
    total, near = sum(report.num_images for report in reports), sum(report.num_leaked for report in reports)
    found = f"{near:,} of {total:,} synthetic images nearly equal a test image; they were left out of the training"
    return judge(
        "near-duplicates",
        near <= NEAR_TEST_SHARE * total,
        found if labels else "there are no synthetic images in the training",
        NEAR_TEST,
    )


def _check_selection(model: Stage) -> SanityCheck:
    threshold = "not by test images"
    if is_given(model):
        return not_run("selection", UNKNOWN_TRAINING, threshold)
    trained = _finished(model, TrainReport)
    return judge("selection", trained.selection_split != "test", f"released weights: {trained.selection}", threshold)


def _finished(stage: Stage, kind: type[R]) -> R:
    if (report := stage.finished(kind)) is None:
        raise DataIntegrityError(f"{stage.folder} is not a finished stage {stage.name!r}; run the pipeline first")
    return report
