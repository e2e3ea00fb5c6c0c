"""Labeling shards: a parquet side table for each, beside the images that are never rewritten."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, UInt8
from scipy import stats

from proxyrob.errors import DataIntegrityError
from proxyrob.label.leaks import LeakFinder
from proxyrob.label.rule import GIVEN, LEAK, UNSURE, apply_rule
from proxyrob.memory import at_most
from proxyrob.models import Classifier, load_classifier
from proxyrob.shards import (
    INDEX,
    ShardEntry,
    SideIndex,
    describe_tables,
    in_workers_order,
    read_manifest,
    read_shard,
    read_side_index,
    read_side_table,
    store_index,
    write_side_table,
)
from proxyrob.source import read_split, source_report
from proxyrob.storage import DataPlace, Report, Stage
from proxyrob.storage.shared import SharedFiles, finish_once
from proxyrob.types import OnProgress, as_images, no_progress

BATCH_SIZE = 500
MAX_LEAKED_SHARE = 0.01
SUSPICION = 1e-6
"""A shard whose class counts are this improbable, given those of the whole set, is reported."""


class LabelReport(Report):
    """What the labelers and the filters did to a set of images.

    ``suspicious_shards`` have classes in shares far off those of the whole set.
    """

    num_images: int
    num_kept: int
    num_disagree: int
    num_leaked: int
    kept_per_class: tuple[int, ...]
    dropped_per_class: tuple[int, ...]
    suspicious_shards: tuple[str, ...]


def label_shards(
    threshold: float,
    *,
    source: Stage,
    images: DataPlace,
    first: Stage,
    second: Stage,
    stage: Stage,
    labels: DataPlace | None = None,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> LabelReport:
    """Let two labelers vote on every image of a set, apply the filter rule and drop near-duplicates of test images.

    Writes one table per shard (columns: ``proxyrob.label.rule.apply_rule``) into ``labels`` (without it into the stage's own
    folder). Any number of workers may do this at once, with one stage or each with its own: each shard is labelled by whoever
    claims it first. Raises ``DataIntegrityError`` when a shard is damaged, when a class is left with no image, or when more
    than one image in a hundred is a near-duplicate of a test image.
    """
    described = {"rule": "two labelers", "threshold": threshold, "labelers": [first.digest, second.digest]}
    place = DataPlace.of(stage.folder) if labels is None else labels

    def label(started: float) -> LabelReport:
        labelers = [load_classifier(labeler, device) for labeler in (first, second)]

        def vote(shard: ShardEntry, pictures: UInt8[np.ndarray, "n h w c"]) -> pd.DataFrame:
            votes = [_probabilities(labeler, pictures, device) for labeler in labelers]
            return apply_rule(shard.first_id + np.arange(shard.num_images), votes[0], votes[1], threshold)

        return _label(vote, described, source, images, place, stage, device, on_progress, started)

    return finish_once(stage, LabelReport, label)


def adopt_labels(
    *,
    source: Stage,
    images: DataPlace,
    given: DataPlace,
    labels: DataPlace,
    stage: Stage,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> LabelReport:
    """Take over the labels that a published set came with, and drop near-duplicates of test images.

    ``given`` holds the side tables of the import. Raises ``DataIntegrityError`` as ``label_shards`` does, and when the
    set's classes are not those of the source.
    """

    def label(started: float) -> LabelReport:
        index = read_side_index(given, read_manifest(images))
        tables = {table.name: table for table in index.tables}
        names = source_report(source).class_names
        if len(index.class_names) != len(names):
            raise DataIntegrityError(
                f"{given.uri} has labels of {len(index.class_names)} classes, the real images have {len(names)}; "
                "import the set with the labels of this data set"
            )

        def adopt(shard: ShardEntry, _pictures: UInt8[np.ndarray, "n h w c"]) -> pd.DataFrame:
            return read_side_table(given, tables[shard.name])

        return _label(adopt, {"rule": GIVEN}, source, images, labels, stage, device, on_progress, started)

    return finish_once(stage, LabelReport, label)


def _label(
    label_one: Callable[[ShardEntry, UInt8[np.ndarray, "n h w c"]], pd.DataFrame],
    described: dict[str, object],
    source: Stage,
    images: DataPlace,
    labels: DataPlace,
    stage: Stage,
    device: str,
    on_progress: OnProgress,
    started: float,
) -> LabelReport:
    manifest = read_manifest(images)
    names = source_report(source).class_names
    leaks = LeakFinder(read_split(source, "test").stored, device=device)
    if manifest.image_shape != leaks.image_shape:
        raise DataIntegrityError(
            f"{images.uri} has images of shape {manifest.image_shape}, the real images have {leaks.image_shape}; "
            "choose a set of the same size"
        )
    shards = {shard.name: shard for shard in manifest.shards}

    def label_shard(name: str) -> None:
        pictures = read_shard(images, shards[name], manifest.image_shape)
        table = label_one(shards[name], pictures)
        table["near_test"] = found = leaks.find(pictures)
        table["kept"] &= found < 0
        table["reason"] = table.reason.where(found < 0, LEAK)
        write_side_table(labels, name, table)

    def tell(done: set[str]) -> bool:
        on_progress(sum(shards[name].num_images for name in done), manifest.num_images)
        return False

    def conclude() -> LabelReport:
        index = describe_tables(labels, manifest, described, names)
        report = _report(index, labels, images.uri, described["rule"] != GIVEN)
        store_index(labels, index)
        own = labels.is_folder(stage.folder)
        return stage.finish(report, [INDEX, *(entry.key for entry in index.tables)] if own else [], started)

    work = SharedFiles(labels, ".parquet", stage.is_whole)
    work.complete(in_workers_order(list(shards)), label_shard, tell)
    return work.conclude(conclude)


def _report(index: SideIndex, labels: DataPlace, images: str, are_votes: bool) -> LabelReport:
    """Count what labelers and filters did. Raises ``DataIntegrityError`` where the set ``images`` cannot be trained on."""
    columns = ["first_class", "second_class", "reason"] if are_votes else ["reason"]
    table = pd.concat([read_side_table(labels, entry, columns) for entry in index.tables], ignore_index=True)
    num_leaked = int((table.reason == LEAK).sum())
    if num_leaked > MAX_LEAKED_SHARE * len(table):
        raise DataIntegrityError(
            f"{num_leaked} of {len(table)} images of {images} are near-duplicates of test images: the set seems to contain "
            "the test split, and figures of models trained on it would mean nothing; use another set"
        )
    if (empty := np.flatnonzero(np.array(index.kept_per_class) == 0)).size:
        raise DataIntegrityError(
            f"no synthetic image of class {', '.join(index.class_names[k] for k in empty)} passes the filter "
            f"({sum(index.dropped_per_class)} of {len(table)} dropped); lower label.threshold or train the proxy longer"
        )
    assert int(table.reason.isin([UNSURE, LEAK]).sum()) == sum(index.dropped_per_class)
    return LabelReport(
        num_images=len(table),
        num_kept=sum(index.kept_per_class),
        num_disagree=int((table.first_class != table.second_class).sum()) if are_votes else 0,
        num_leaked=num_leaked,
        kept_per_class=index.kept_per_class,
        dropped_per_class=index.dropped_per_class,
        suspicious_shards=suspicious_shards(index),
    )


def suspicious_shards(index: SideIndex) -> tuple[str, ...]:
    """Shards whose class counts are far off the set's, by a χ² test of each shard against all others.

    Samples are exchangeable between shards, so this finds a generator that went wrong for a while, or a set that was
    sorted by class.
    """
    counts = np.array([np.add(table.kept_per_class, table.dropped_per_class) for table in index.tables])
    rest = counts.sum(axis=0) - counts
    found = []
    for table, own, others in zip(index.tables, counts, rest, strict=True):
        both = np.stack([own, others])[:, own + others > 0]
        if both[1].sum() and both.shape[1] > 1 and stats.chi2_contingency(both).pvalue < SUSPICION:  # pyright: ignore[reportAttributeAccessIssue]  (a named result since scipy 1.11)
            found.append(table.name)
    return tuple(found)


@torch.inference_mode()
def _probabilities(labeler: Classifier, images: UInt8[np.ndarray, "n h w c"], device: str) -> Float[np.ndarray, "n k"]:
    parts = []
    size = at_most(BATCH_SIZE)
    for start in range(0, len(images), size):
        batch = as_images(images[start : start + size]).to(device)
        parts.append(labeler(batch).softmax(dim=1).cpu().numpy())
    return np.concatenate(parts)
