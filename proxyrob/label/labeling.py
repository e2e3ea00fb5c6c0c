"""Labeling shards: a parquet side table for each, beside the images that are never rewritten."""

import time

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, UInt8

from proxyrob.errors import DataIntegrityError
from proxyrob.label.rule import UNSURE, apply_rule
from proxyrob.models import Classifier, load_classifier
from proxyrob.shards import read_manifest, read_shard
from proxyrob.source import source_report
from proxyrob.storage import Report, Stage
from proxyrob.storage.files import run_units
from proxyrob.types import OnProgress, as_images, no_progress

BATCH_SIZE = 500


class LabelReport(Report):
    """What the labelers and the filter did to a set of images."""

    num_images: int
    num_kept: int
    num_disagree: int
    kept_per_class: tuple[int, ...]
    dropped_per_class: tuple[int, ...]


def label_shards(
    threshold: float,
    *,
    source: Stage,
    samples: Stage,
    first: Stage,
    second: Stage,
    stage: Stage,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> LabelReport:
    """Let two labelers vote on every image of ``samples`` and apply the filter rule.

    Writes one table per shard (columns: ``proxyrob.label.rule.apply_rule``). Raises ``DataIntegrityError`` when a shard
    is damaged, or when the filter leaves a class with no image.
    """
    if (report := stage.finished(LabelReport)) is not None:
        return report
    started = time.monotonic()
    manifest = read_manifest(samples.folder)
    num_classes = len(source_report(source).class_names)
    labelers = [load_classifier(labeler, device) for labeler in (first, second)]
    shards = {shard.name: shard for shard in manifest.shards}

    def label_one(name: str) -> pd.DataFrame:
        shard = shards[name]
        images = read_shard(samples.folder, shard, manifest.image_shape)
        votes = [_probabilities(labeler, images, device) for labeler in labelers]
        return apply_rule(shard.first_id + np.arange(shard.num_images), votes[0], votes[1], threshold)

    table = run_units(
        stage.folder,
        list(shards),
        label_one,
        lambda done: on_progress(done * manifest.num_images // len(shards), manifest.num_images),
    )
    kept = np.bincount(table.label[table.kept], minlength=num_classes)
    dropped = np.bincount(table.label[~table.kept], minlength=num_classes)
    if (empty := np.flatnonzero(kept == 0)).size:
        raise DataIntegrityError(
            f"no synthetic image of class {', '.join(str(k) for k in empty)} passes the filter "
            f"({len(table) - int(table.kept.sum())} of {len(table)} dropped); lower label.threshold or train the proxy longer"
        )
    report = LabelReport(
        num_images=len(table),
        num_kept=int(table.kept.sum()),
        num_disagree=int((table.first_class != table.second_class).sum()),
        kept_per_class=tuple(int(count) for count in kept),
        dropped_per_class=tuple(int(count) for count in dropped),
    )
    assert int((table.reason == UNSURE).sum()) == int(dropped.sum())
    return stage.finish(report, [f"{name}.parquet" for name in shards], started)


def read_labels(samples: Stage, labels: Stage) -> pd.DataFrame:
    """The side tables of all shards in the order of the images, hashes checked."""
    tables = [pd.read_parquet(labels.verified(f"{shard.name}.parquet")) for shard in read_manifest(samples.folder).shards]
    return pd.concat(tables, ignore_index=True)


@torch.inference_mode()
def _probabilities(labeler: Classifier, images: UInt8[np.ndarray, "n h w c"], device: str) -> Float[np.ndarray, "n k"]:
    parts = []
    for start in range(0, len(images), BATCH_SIZE):
        batch = as_images(images[start : start + BATCH_SIZE]).to(device)
        parts.append(labeler(batch).softmax(dim=1).cpu().numpy())
    return np.concatenate(parts)
