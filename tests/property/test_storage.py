"""Reading what was written, for any images and labels."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from proxyrob.shards import describe_shards, read_manifest, read_shard, shard_name, write_manifest, write_shard
from proxyrob.source import read_split, source_report
from proxyrob.source.splits import SplitName, write_splits
from proxyrob.storage import DataPlace
from proxyrob.types import as_images, as_stored
from tests.toys import stage_in

shapes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
NAMES: tuple[SplitName, ...] = ("train", "validation", "test")


@st.composite
def image_sets(draw: st.DrawFn, least: int = 1) -> list[np.ndarray]:
    """Some sets of images of one shape."""
    shape = draw(shapes)
    sizes = draw(st.lists(st.integers(least, 5), min_size=3, max_size=3))
    return [draw(hnp.arrays(np.uint8, (size, *shape))) for size in sizes]


@settings(max_examples=25)  # each example writes files
@given(image_sets(), st.integers(0, 2**63))
def test_shards_are_read_as_they_were_written(parts: list[np.ndarray], seed: int) -> None:
    """Every shard gives back its images bit for bit, and the manifest their ranges."""
    with TemporaryDirectory() as name:
        place = DataPlace.of(Path(name))
        first_ids = np.cumsum([0, *map(len, parts)]).tolist()
        for number, images in enumerate(parts):
            write_shard(place, shard_name(number), images)
        written = describe_shards(
            place,
            shards=[(shard_name(number), first_ids[number], len(images)) for number, images in enumerate(parts)],
            image_shape=parts[0].shape[1:],
            generator="g",
            source_sha256="s",
            sampler={"kind": "jitter"},
            seed=seed,
        )
        write_manifest(place, written)
        manifest = read_manifest(place)
        assert manifest == written
        assert (manifest.num_images, manifest.seed) == (sum(map(len, parts)), seed)
        for entry, images, first_id in zip(manifest.shards, parts, first_ids, strict=False):
            assert entry.first_id == first_id
            assert np.array_equal(read_shard(place, entry, manifest.image_shape), images)


@settings(max_examples=25)  # each example writes files
@given(image_sets(least=3))
def test_splits_are_read_as_they_were_written(parts: list[np.ndarray]) -> None:
    """Every split gives back its images and labels bit for bit."""
    with TemporaryDirectory() as folder:
        stage = stage_in(Path(folder), "source")
        splits: dict[SplitName, tuple[np.ndarray, np.ndarray]] = {
            name: (images, np.arange(len(images)) % 3) for name, images in zip(NAMES, parts, strict=True)
        }
        write_splits(stage, splits, class_names=("a", "b", "c"))
        for name, (images, labels) in splits.items():
            found = read_split(stage, name)
            assert np.array_equal(found.stored, images)
            assert np.array_equal(found.labels, labels)
        assert source_report(stage).num_train == len(parts[0])


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))))
def test_computed_images_are_stored_as_they_were_read(stored: np.ndarray) -> None:
    """uint8 to float and back is the identity, and floats lie in [0,1]."""
    images = as_images(stored)
    assert float(images.min()) >= 0.0
    assert float(images.max()) <= 1.0
    assert np.array_equal(as_stored(images), stored)
