"""All pictures of one run."""

import time

import numpy as np
import pandas as pd

from proxyrob.certify import read_certificates
from proxyrob.figures.pictures import draw_certified_curves, draw_dropped, draw_real_and_synthetic, draw_training_curves
from proxyrob.mix import SyntheticSet
from proxyrob.shards import read_manifest, read_shard, read_side_index, read_side_table
from proxyrob.source import read_split, source_report
from proxyrob.storage import Report, Stage
from proxyrob.train import read_history
from proxyrob.types import OnProgress, no_progress

REAL_AND_SYNTHETIC = "real-and-synthetic.png"
DROPPED = "dropped.png"
CERTIFIED = "certified-accuracy.png"
CURVES = "training-curves.png"
DROPPED_LOOKED_AT = 1000


class PicturesReport(Report):
    """Which pictures there are."""

    names: tuple[str, ...]


def draw_run(
    synthetic_name: str,
    *,
    source: Stage,
    synthetic: SyntheticSet | None,
    trainings: dict[str, Stage],
    certifications: dict[str, Stage],
    stage: Stage,
    on_progress: OnProgress = no_progress,
) -> PicturesReport:
    """Draw what a run has: images of its data, what the filter dropped, curves of training and of certified accuracy."""
    if (report := stage.finished(PicturesReport)) is not None:
        return report
    started = time.monotonic()
    names = [CERTIFIED, CURVES]
    if synthetic is not None:
        names += _draw_synthetic(synthetic_name, source, synthetic, stage)
    on_progress(1, 3)
    certificates = {name: read_certificates(certification) for name, certification in certifications.items()}
    header = next(iter(certificates.values()))[1]
    draw_certified_curves(
        stage.folder / CERTIFIED,
        {name: table for name, (table, _) in certificates.items()},
        sigma=header.sigma,
        conditions=header.conditions,
    )
    on_progress(2, 3)
    draw_training_curves(stage.folder / CURVES, {name: read_history(training) for name, training in trainings.items()})
    on_progress(3, 3)
    return stage.finish(PicturesReport(names=tuple(names)), names, started)


def _draw_synthetic(synthetic_name: str, source: Stage, synthetic: SyntheticSet, stage: Stage) -> list[str]:
    """Kept images of the first shard, and dropped ones from the first shards that have some."""
    manifest = read_manifest(synthetic.images)
    index = read_side_index(synthetic.labels, manifest)
    class_names = source_report(source).class_names
    real = read_split(source, "train")
    kept: tuple[np.ndarray, np.ndarray] | None = None
    dropped, rows = [], []
    for shard, entry in zip(manifest.shards, index.tables, strict=True):
        if kept is not None and (sum(len(part) for part in rows) >= DROPPED_LOOKED_AT or not sum(entry.dropped_per_class)):
            continue
        images = read_shard(synthetic.images, shard, manifest.image_shape, mapped=True)
        table = read_side_table(synthetic.labels, entry)
        chosen = table.kept.to_numpy()
        if kept is None:
            kept = images[chosen], table.label.to_numpy()[chosen]
        dropped.append(images[~chosen])
        rows.append(table[~chosen])
    assert kept is not None  # a set has at least one shard
    draw_real_and_synthetic(
        stage.folder / REAL_AND_SYNTHETIC,
        (real.stored, real.labels),
        kept,
        class_names,
        synthetic_name=synthetic_name,
    )
    draw_dropped(
        stage.folder / DROPPED,
        np.concatenate(dropped),
        pd.concat(rows),
        class_names,
        num_images=manifest.num_images,
        num_dropped=sum(index.dropped_per_class),
    )
    return [REAL_AND_SYNTHETIC, DROPPED]
