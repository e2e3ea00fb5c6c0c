"""A picture of a set of synthetic images."""

from pathlib import Path

import numpy as np

from proxyrob.figures.pictures import draw_contact_sheet
from proxyrob.shards import read_manifest, read_shard, read_side_index, read_side_table
from proxyrob.storage import DataPlace

LOOKED_AT = 2000
UNLABELLED = 160


def draw_set(path: Path, images: DataPlace, labels: DataPlace | None) -> None:
    """A contact sheet of images from the beginning, the middle and the end of a set, by class where ``labels`` are given.

    Raises ``DataIntegrityError`` when a shard or a side table is damaged.
    """
    manifest = read_manifest(images)
    index = read_side_index(labels, manifest) if labels is not None else None
    pictures, classes = [], []
    for number in sorted({0, len(manifest.shards) // 2, len(manifest.shards) - 1}):
        shard = manifest.shards[number]
        step = max(1, shard.num_images // LOOKED_AT)
        found = read_shard(images, shard, manifest.image_shape, mapped=True)[::step]
        if index is not None and labels is not None:
            table = read_side_table(labels, index.tables[number], ["label", "kept"])[::step]
            kept = table.kept.to_numpy()
            found = found[kept]
            classes.append(table.label.to_numpy()[kept])
        pictures.append(found)
    chosen = np.concatenate(pictures)
    title = f"{manifest.num_images:,} synthetic images ({manifest.sampler.get('kind', 'unknown')})"
    if index is None:
        every = max(1, len(chosen) // UNLABELLED)
        draw_contact_sheet(path, chosen[::every][:UNLABELLED], None, (), title=title)
        return
    order = np.random.default_rng(0).permutation(len(chosen))  # so that a row shows more than the first shard
    draw_contact_sheet(path, chosen[order], np.concatenate(classes)[order].astype(np.int64), index.class_names, title=title)
