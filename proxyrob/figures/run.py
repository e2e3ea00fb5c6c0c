"""All pictures of one run."""

import time

import numpy as np
import pandas as pd

from proxyrob.certify import read_certificates
from proxyrob.figures.pictures import draw_certified_curves, draw_dropped, draw_real_and_synthetic, draw_training_curves
from proxyrob.label import read_labels
from proxyrob.shards import read_manifest, read_shard
from proxyrob.source import read_split, source_report
from proxyrob.storage import Report, Stage
from proxyrob.train import read_history
from proxyrob.types import OnProgress, no_progress

REAL_AND_SYNTHETIC = "real-and-synthetic.png"
DROPPED = "dropped.png"
CERTIFIED = "certified-accuracy.png"
CURVES = "training-curves.png"


class PicturesReport(Report):
    """Which pictures there are."""

    names: tuple[str, ...]


def draw_run(
    synthetic_name: str,
    *,
    source: Stage,
    synthetic: tuple[Stage, Stage] | None,
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
        stage.folder / CERTIFIED, {name: table for name, (table, _) in certificates.items()}, sigma=header.sigma, n=header.n
    )
    on_progress(2, 3)
    draw_training_curves(stage.folder / CURVES, {name: read_history(training) for name, training in trainings.items()})
    on_progress(3, 3)
    return stage.finish(PicturesReport(names=tuple(names)), names, started)


def _draw_synthetic(synthetic_name: str, source: Stage, synthetic: tuple[Stage, Stage], stage: Stage) -> list[str]:
    samples, labels = synthetic
    manifest = read_manifest(samples.folder)
    table = read_labels(samples, labels)
    class_names = source_report(source).class_names
    real = read_split(source, "train")
    first = manifest.shards[0]
    images = read_shard(samples.folder, first, manifest.image_shape)
    kept = table.kept.to_numpy()[: first.num_images]
    draw_real_and_synthetic(
        stage.folder / REAL_AND_SYNTHETIC,
        (real.stored, real.labels),
        (images[kept], table.label.to_numpy()[: first.num_images][kept]),
        class_names,
        synthetic_name=synthetic_name,
    )
    dropped, rows = [], []
    for shard in manifest.shards:
        part: pd.DataFrame = table.iloc[shard.first_id : shard.first_id + shard.num_images]
        chosen = ~part.kept.to_numpy()
        if chosen.any():
            dropped.append(read_shard(samples.folder, shard, manifest.image_shape)[chosen])
            rows.append(part[chosen])
    draw_dropped(
        stage.folder / DROPPED,
        np.concatenate(dropped) if dropped else images[:0],
        pd.concat(rows) if rows else table.iloc[:0],
        class_names,
        num_images=len(table),
    )
    return [REAL_AND_SYNTHETIC, DROPPED]
