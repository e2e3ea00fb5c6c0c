"""Batches of real and synthetic images: shares, weights, and nothing that depends on what ran before."""

import numpy as np
import pytest
import torch

from proxyrob.config import JitterProxy, SamplingConfig
from proxyrob.errors import DataIntegrityError
from proxyrob.label import label_shards, read_labels
from proxyrob.mix import Mix, read_synthetic, shift_images
from proxyrob.proxy import sample_proxy
from proxyrob.rng import Streams
from proxyrob.source import Split
from proxyrob.storage import Stage
from proxyrob.types import as_images
from tests.conftest import MakeStage
from tests.toys import damage, random_images, tiny_split

Synthetic = tuple[np.ndarray, np.ndarray, np.ndarray]


def _synthetic(count: int = 7) -> Synthetic:
    other = tiny_split(count, seed=9)
    return other.stored, other.labels, 100 + np.arange(count, dtype=np.int64)


def _mix(split: Split, synthetic: Synthetic | None = None, *, gamma: float = 0.3, shift: int = 0, seed: int = 0) -> Mix:
    return Mix(
        split,
        synthetic,
        batch_size=10,
        num_synthetic=4 if synthetic else 0,
        gamma=gamma if synthetic else 1.0,
        shift=shift,
        streams=Streams(seed),
    )


def test_a_batch_has_both_parts_with_their_images_and_labels(split: Split) -> None:
    """Six real images, then four synthetic ones, each with its own label, named by row and by image id."""
    synthetic = _synthetic()
    batch = _mix(split, synthetic).batch(3)
    assert (len(batch), batch.num_real, batch.images.shape) == (10, 6, (10, 1, 4, 4))
    real, made = batch.indices[:6], batch.indices[6:] - 100
    assert torch.equal(batch.images, torch.cat([split.images[real], as_images(synthetic[0][made])]))
    assert batch.labels.tolist() == [*split.labels[real].tolist(), *synthetic[1][made].tolist()]


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
def test_weights_sum_to_one_and_to_gamma_on_real_images(split: Split, gamma: float) -> None:
    """The weighted sum of losses is γ·mean(real) + (1-γ)·mean(synthetic), whatever the sizes of the parts."""
    batch = _mix(split, _synthetic(), gamma=gamma).batch(0)
    assert batch.weights.sum().item() == pytest.approx(1.0)
    assert batch.weights[:6].tolist() == pytest.approx([gamma / 6] * 6)
    assert batch.weights[6:].tolist() == pytest.approx([(1 - gamma) / 4] * 4)


def test_real_images_alone_have_all_the_weight(split: Split) -> None:
    """Without synthetic images the loss is the plain mean over the batch."""
    batch = _mix(split).batch(0)
    assert (len(batch), batch.num_real) == (10, 10)
    assert batch.weights.tolist() == pytest.approx([0.1] * 10)


def test_a_batch_is_a_function_of_the_step(split: Split) -> None:
    """Step 5 is the same batch from a fresh mix as after other steps, shift included; other steps and seeds differ."""
    used = _mix(split, _synthetic(), shift=1)
    for step in (9, 0, 3):
        used.batch(step)
    first, second = used.batch(5), _mix(split, _synthetic(), shift=1).batch(5)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert np.array_equal(first.indices, second.indices)
    other_step, other_seed = used.batch(6), _mix(split, _synthetic(), shift=1, seed=1).batch(5)
    assert not np.array_equal(first.indices, other_step.indices)
    assert not np.array_equal(first.indices, other_seed.indices)


def test_every_image_comes_once_per_epoch_of_its_own_part(split: Split) -> None:
    """30 real images in batches of 6: each once in five steps; 7 synthetic ones in batches of 4: each four times in seven."""
    mix = _mix(split, _synthetic(7))
    real = np.concatenate([mix.batch(step).indices[:6] for step in range(5)])
    made = np.concatenate([mix.batch(step).indices[6:] for step in range(7)])
    assert sorted(real.tolist()) == list(range(30))
    assert np.bincount(made - 100).tolist() == [4] * 7


def test_the_real_part_does_not_depend_on_the_synthetic_one(split: Split) -> None:
    """Another set of synthetic images leaves the order of the real ones as it was: two proxies are compared fairly."""
    one, other = _mix(split, _synthetic(7)), _mix(split, _synthetic(20))
    assert all(np.array_equal(one.batch(step).indices[:6], other.batch(step).indices[:6]) for step in range(4))


def test_a_batch_describes_its_images(split: Split) -> None:
    """An error text can name the rows of the training split and the ids of the synthetic images."""
    batch = _mix(split, _synthetic()).batch(0)
    real, made = batch.indices[:6].tolist(), batch.indices[6:].tolist()
    assert batch.describe() == f"real images {real}, synthetic images {made}"
    assert min(made) >= 100


@pytest.mark.parametrize(("synthetic", "num_synthetic"), [(None, 4), (_synthetic(), 0)])
def test_synthetic_images_and_their_number_belong_together(
    split: Split, synthetic: Synthetic | None, num_synthetic: int
) -> None:
    """Synthetic images that no batch would use, or a share of none, is refused."""
    with pytest.raises(ValueError, match=f"expected synthetic images exactly when .* got num_synthetic={num_synthetic}"):
        Mix(split, synthetic, batch_size=10, num_synthetic=num_synthetic, gamma=0.5, shift=0, streams=Streams(0))


def test_synthetic_images_of_another_shape_are_refused(split: Split) -> None:
    """Images of a proxy that was fitted to another data set do not fit."""
    other = tiny_split(7, shape=(5, 4, 1))
    with pytest.raises(ValueError, match=r"expected synthetic images of shape \(4, 4, 1\), got \(5, 4, 1\)"):
        _mix(split, (other.stored, other.labels, np.arange(7, dtype=np.int64)))


def test_an_empty_set_of_images_is_refused(split: Split) -> None:
    """There is nothing to draw from no image."""
    with pytest.raises(ValueError, match=r"expected at least one image to draw from \(mix/synthetic\), got 0"):
        _mix(split, (split.stored[:0], split.labels[:0], np.arange(0, dtype=np.int64)))


# Shifting


def _shifted_by_hand(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """The image moved by whole pixels, pixel by pixel, 0 where nothing moved in."""
    moved = torch.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                moved[:, row, column] = image[:, row - down, column - right]
    return moved


@pytest.mark.parametrize("most", [1, 2, 5])
def test_shifting_equals_a_plain_loop(most: int) -> None:
    """Every image is moved by the offsets of its stream, alike in all channels, and filled with 0."""
    images = random_images(12, shape=(2, 4, 6))
    offsets = torch.randint(0, 2 * most + 1, (2, 12), generator=torch.Generator().manual_seed(5))
    shifted = shift_images(images, most, torch.Generator().manual_seed(5))
    expected = [_shifted_by_hand(image, most - int(a), most - int(b)) for image, (a, b) in zip(images, offsets.T, strict=True)]
    assert torch.equal(shifted, torch.stack(expected))
    assert shifted.is_contiguous()


def test_shifts_reach_every_direction_and_stay_within_the_limit() -> None:
    """Over many images all nine moves of at most one pixel occur, and no other."""
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 2] = 1.0
    shifted = shift_images(image.expand(300, -1, -1, -1), 1, torch.Generator().manual_seed(0))
    places = {tuple(place) for place in shifted.nonzero()[:, 2:].tolist()}
    assert places == {(row, column) for row in (1, 2, 3) for column in (1, 2, 3)}


def test_shift_is_used_for_both_parts(split: Split) -> None:
    """With a shift the batch has the same images moved; without one they are as stored."""
    still, moved = _mix(split, _synthetic()).batch(4), _mix(split, _synthetic(), shift=1).batch(4)
    assert np.array_equal(still.indices, moved.indices)
    expected = shift_images(still.images, 1, Streams(0).torch("mix/shift", step=4))
    assert torch.equal(moved.images, expected)
    assert not torch.equal(moved.images[:6], still.images[:6])
    assert not torch.equal(moved.images[6:], still.images[6:])


# Reading


def test_only_images_that_passed_the_filter_are_read(samples: Stage, labels: Stage) -> None:
    """Kept images, their labels and ids belong together, across shards; dropped ones are not there."""
    images, classes, ids = read_synthetic(samples, labels)
    table = read_labels(samples, labels)
    kept = table[table.kept]
    assert ids.tolist() == kept.id.tolist()
    assert classes.tolist() == kept.label.tolist()
    assert (len(images), classes.dtype, ids.dtype) == (len(kept), np.int64, np.int64)
    assert 0 < len(kept) < len(table)
    last = np.load(samples.folder / "shard-000002.npy")
    assert np.array_equal(images[ids >= 100], last[ids[ids >= 100] - 100])


def test_labels_of_other_samples_are_refused(
    samples: Stage, digits: Stage, toy_classifier: Stage, other_classifier: Stage, make_stage: MakeStage
) -> None:
    """Side tables that do not cover the images are refused with both numbers."""
    more = make_stage("samples")
    sampling = SamplingConfig(shard_size=60, batch_size=60)
    sample_proxy(JitterProxy(num_images=150, sigma=0.05), sampling, source=digits, proxy=None, seed=0, stage=more)
    stage = make_stage("labels")
    label_shards(0.0, source=digits, samples=more, first=toy_classifier, second=other_classifier, stage=stage)
    with pytest.raises(DataIntegrityError, match=r"has labels for 150 images, .* has 120 images"):
        read_synthetic(samples, stage)


def test_a_damaged_side_table_is_named(
    digits: Stage, samples: Stage, toy_classifier: Stage, other_classifier: Stage, make_stage: MakeStage
) -> None:
    """Labels are hashed before training on them."""
    stage = make_stage("labels")
    label_shards(0.0, source=digits, samples=samples, first=toy_classifier, second=other_classifier, stage=stage)
    damage(stage.folder / "shard-000001.parquet")
    with pytest.raises(DataIntegrityError, match=r"shard-000001\.parquet is damaged"):
        read_synthetic(samples, stage)
