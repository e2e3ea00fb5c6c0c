"""Batches of real and synthetic images: shares, weights, ranks, and nothing that depends on what ran before."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proxyrob.errors import DataIntegrityError
from proxyrob.mix import Augmentation, Mix, MixedBatch, SyntheticSet, cut_and_paste
from proxyrob.mix.augment import draw_box, soften
from proxyrob.rng import Streams
from proxyrob.source import Split
from proxyrob.types import as_images
from tests.toys import damage, tiny_split, write_set

MakeSet = Callable[..., SyntheticSet]
ALL = Augmentation(shift=1, flip=True, cutmix=0.6)


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    """``make_set(7)``: seven random labelled images in shards of five."""
    made: list[SyntheticSet] = []

    def make(count: int = 7, *, shape: tuple[int, int, int] = (4, 4, 1), seed: int = 9, **about: Any) -> SyntheticSet:
        other = tiny_split(count, shape=shape, seed=seed)
        made.append(write_set(tmp_path / str(len(made)), other.stored, other.labels, **about))
        return made[-1]

    return make


def _mix(
    split: Split,
    synthetic: Sequence[SyntheticSet] = (),
    *,
    batch_size: int = 10,
    num_synthetic: int = 4,
    gamma: float = 0.3,
    augmentation: Augmentation = Augmentation(),  # noqa: B008  (frozen)
    seed: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
) -> Mix:
    return Mix(
        split,
        synthetic,
        batch_size=batch_size,
        num_synthetic=num_synthetic if synthetic else 0,
        gamma=gamma if synthetic else 1.0,
        num_classes=10,
        augmentation=augmentation,
        streams=Streams(seed),
        rank=rank,
        num_ranks=num_ranks,
    )


def _rows(batch: MixedBatch) -> list[tuple[object, ...]]:
    """Each image of a batch with all that belongs to it."""
    parts = [part for part, count in batch.parts for _ in range(count)]
    return [
        (part, int(index), image.numpy().tobytes(), int(label), target.tolist())
        for part, index, image, label, target in zip(
            parts, batch.indices, batch.images, batch.labels, batch.targets, strict=True
        )
    ]


def _same(one: MixedBatch, other: MixedBatch) -> bool:
    return _rows(one) == _rows(other) and torch.equal(one.weights, other.weights)


def test_a_batch_has_both_parts_with_their_images_and_labels(split: Split, make_set: MakeSet) -> None:
    """Six real images, then four synthetic ones, each with its own label, named by row and by image id."""
    other = tiny_split(7, seed=9)
    batch = _mix(split, [make_set()]).batch(3)
    assert (len(batch), batch.num_real, batch.images.shape) == (10, 6, (10, 1, 4, 4))
    real, made = batch.indices[:6], batch.indices[6:]
    assert torch.equal(batch.images, torch.cat([split.images[real], other.images[made]]))
    assert batch.labels.tolist() == [*split.labels[real].tolist(), *other.labels[made].tolist()]
    assert batch.targets is batch.labels


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
def test_weights_sum_to_one_and_to_gamma_on_real_images(split: Split, make_set: MakeSet, gamma: float) -> None:
    """The weighted sum of losses is γ·mean(real) + (1-γ)·mean(synthetic), whatever the sizes of the parts."""
    batch = _mix(split, [make_set()], gamma=gamma).batch(0)
    assert batch.weights.sum().item() == pytest.approx(1.0)
    assert batch.weights[:6].tolist() == pytest.approx([gamma / 6] * 6)
    assert batch.weights[6:].tolist() == pytest.approx([(1 - gamma) / 4] * 4)


def test_real_images_alone_have_all_the_weight(split: Split) -> None:
    """Without synthetic images the loss is the plain mean over the batch."""
    batch = _mix(split).batch(0)
    assert (len(batch), batch.num_real, batch.parts) == (10, 10, (("real", 10),))
    assert batch.weights.tolist() == pytest.approx([0.1] * 10)


def test_a_batch_is_a_function_of_the_step(split: Split, make_set: MakeSet) -> None:
    """Step 5 is the same batch from a fresh mix as after other steps, augmentation included; other steps and seeds differ."""
    made = make_set()
    used = _mix(split, [made], augmentation=ALL)
    for step in (9, 0, 3):
        used.batch(step)
    first, second = used.batch(5), _mix(split, [made], augmentation=ALL).batch(5)
    assert _same(first, second)
    other_step, other_seed = used.batch(6), _mix(split, [made], augmentation=ALL, seed=1).batch(5)
    assert not np.array_equal(first.indices, other_step.indices)
    assert not np.array_equal(first.indices, other_seed.indices)


def test_every_image_comes_once_per_epoch_of_its_own_part(split: Split, make_set: MakeSet) -> None:
    """30 real images in batches of 6: each once in five steps; 7 synthetic ones in batches of 4: each four times in seven."""
    mix = _mix(split, [make_set(7)])
    real = np.concatenate([mix.batch(step).indices[:6] for step in range(5)])
    made = np.concatenate([mix.batch(step).indices[6:] for step in range(7)])
    assert sorted(real.tolist()) == list(range(30))
    assert np.bincount(made).tolist() == [4] * 7


def test_the_real_part_does_not_depend_on_the_synthetic_one(split: Split, make_set: MakeSet) -> None:
    """Another set of synthetic images leaves the order of the real ones as it was: two proxies are compared fairly."""
    one, other = _mix(split, [make_set(7)]), _mix(split, [make_set(20)])
    assert all(np.array_equal(one.batch(step).indices[:6], other.batch(step).indices[:6]) for step in range(4))


def test_the_order_does_not_depend_on_the_shards(split: Split, make_set: MakeSet) -> None:
    """The same images in one file or in many give the same batches."""
    one, many = (_mix(split, [make_set(23, shard_size=size)], augmentation=ALL) for size in (100, 3))
    assert all(_same(one.batch(step), many.batch(step)) for step in range(14))


# Several sets


def test_several_sets_share_the_synthetic_part_by_their_weights(split: Split, make_set: MakeSet) -> None:
    """Weights 3 and 1 of eight synthetic images are six and two, in the order of the sets, each with its own images."""
    sets = [make_set(9, seed=1, weight=3.0, name="one"), make_set(6, seed=2, weight=1.0, name="two")]
    batch = _mix(split, sets, batch_size=12, num_synthetic=8).batch(1)
    assert batch.parts == (("real", 4), ("one", 6), ("two", 2))
    for seed, count, here in ((1, 9, slice(4, 10)), (2, 6, slice(10, 12))):
        other = tiny_split(count, seed=seed)
        assert torch.equal(batch.images[here], other.images[batch.indices[here]])
        assert batch.labels[here].tolist() == other.labels[batch.indices[here]].tolist()
    assert batch.weights[4:].tolist() == pytest.approx([0.7 / 8] * 8)


def test_each_set_has_epochs_of_its_own(split: Split, make_set: MakeSet) -> None:
    """Every image of each set comes once per epoch of that set, in an order of its own."""
    sets = [make_set(6, seed=1), make_set(6, seed=1)]
    mix = _mix(split, sets, batch_size=8, num_synthetic=4)
    drawn = [np.concatenate([mix.batch(step).indices[here] for step in range(3)]) for here in (slice(4, 6), slice(6, 8))]
    assert [sorted(part.tolist()) for part in drawn] == [list(range(6))] * 2
    assert drawn[0].tolist() != drawn[1].tolist()


def test_a_set_keeps_its_order_when_another_is_added(split: Split, make_set: MakeSet) -> None:
    """The first set of several is drawn in the order that it has alone."""
    one, other = make_set(11), make_set(8, seed=3)
    alone = _mix(split, [one], batch_size=8, num_synthetic=2)
    both = _mix(split, [one, other], batch_size=10, num_synthetic=4)
    assert all(np.array_equal(alone.batch(step).indices[6:], both.batch(step).indices[6:8]) for step in range(8))


def test_a_batch_describes_its_images(split: Split, make_set: MakeSet) -> None:
    """An error text can name the rows of the training split and the ids of the images of each set."""
    batch = _mix(split, [make_set(name="jitter"), make_set(name="others")]).batch(0)
    real, one, other = batch.indices[:6].tolist(), batch.indices[6:8].tolist(), batch.indices[8:].tolist()
    assert batch.describe() == f"real images {real}, jitter images {one}, others images {other}"


# Ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_ranks_together_have_the_batch_of_one(split: Split, make_set: MakeSet, num_ranks: int) -> None:
    """Image by image, with augmentation, targets and labels: the union over the ranks is what one process has."""
    sets = [make_set(21, weight=2.0, name="one"), make_set(13, seed=4, name="two")]

    def make(rank: int, of: int) -> Mix:
        return _mix(split, sets, batch_size=48, num_synthetic=24, augmentation=ALL, rank=rank, num_ranks=of)

    whole, ranks = make(0, 1), [make(rank, num_ranks) for rank in range(num_ranks)]
    for step in range(4):
        expected, found = whole.batch(step), [mix.batch(step) for mix in ranks]
        assert sorted(_rows(expected), key=repr) == sorted((row for batch in found for row in _rows(batch)), key=repr)
        assert all(batch.parts == tuple((name, count // num_ranks) for name, count in expected.parts) for batch in found)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_mean_over_the_ranks_is_the_loss_of_one(split: Split, make_set: MakeSet, num_ranks: int) -> None:
    """With any loss of an image, the mean of the ranks' weighted sums is the weighted sum of one process."""
    made = make_set(21)

    def loss(batch: MixedBatch) -> float:
        return float((batch.weights * batch.images.square().flatten(1).mean(1)).sum())

    given: dict[str, Any] = {"batch_size": 24, "num_synthetic": 8, "num_ranks": num_ranks}
    found = [loss(_mix(split, [made], rank=rank, **given).batch(3)) for rank in range(num_ranks)]
    assert np.mean(found) == pytest.approx(loss(_mix(split, [made], batch_size=24, num_synthetic=8).batch(3)), rel=1e-5)


@pytest.mark.parametrize(
    ("num_ranks", "cutmix", "refused"), [(2, 0.0, False), (4, 0.0, True), (1, 0.5, False), (2, 0.5, True), (3, 0.0, True)]
)
def test_parts_that_cannot_be_shared_equally_are_refused(
    split: Split, make_set: MakeSet, num_ranks: int, cutmix: float, refused: bool
) -> None:
    """Six real and four synthetic images fit one or two processes, with CutMix only one: the text says what to change."""

    def make() -> Mix:
        return _mix(split, [make_set()], augmentation=Augmentation(cutmix=cutmix), num_ranks=num_ranks)

    if refused:
        with pytest.raises(ValueError, match=rf"images of a batch cannot be shared by {num_ranks} process.* change batch_size"):
            make()
    else:
        assert make().num_ranks == num_ranks


# Augmentation


def _offsets(step: int, total: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """What the streams of a step say of each image."""
    offsets = torch.randint(0, 2 * most + 1, (2, total), generator=Streams(0).torch("mix/shift", step=step)).numpy()
    return offsets, Streams(0).numpy("mix/flip", step=step).random(total) < 0.5


def test_every_image_is_moved_and_mirrored_as_its_streams_say(split: Split, make_set: MakeSet) -> None:
    """Real and synthetic images alike: mirrored, padded with black, cut out, as a plain loop over single images does."""
    made = make_set()
    still, moved = (_mix(split, [made], augmentation=of).batch(4) for of in (Augmentation(), Augmentation(shift=2, flip=True)))
    assert np.array_equal(still.indices, moved.indices)
    offsets, mirrored = _offsets(4, 10, 2)
    for k in range(10):
        image = still.images[k].numpy()
        padded = np.pad(image[:, :, ::-1] if mirrored[k] else image, ((0, 0), (2, 2), (2, 2)))
        row, column = offsets[:, k]
        assert np.array_equal(moved.images[k].numpy(), padded[:, row : row + 4, column : column + 4])
    assert 0 < mirrored[:6].sum() < 6
    assert 0 < mirrored[6:].sum() < 4


def test_about_half_of_both_parts_is_mirrored(split: Split, make_set: MakeSet) -> None:
    """Over many steps half of the real and half of the synthetic images are mirror images of the stored ones."""
    made = make_set()
    still, flipped = _mix(split, [made]), _mix(split, [made], augmentation=Augmentation(flip=True))
    changed = np.array(
        [(still.batch(step).images != flipped.batch(step).images).flatten(1).any(1).numpy() for step in range(100)]
    )
    assert changed[:, :6].mean() == pytest.approx(0.5, abs=0.08)
    assert changed[:, 6:].mean() == pytest.approx(0.5, abs=0.08)


def test_cutmix_exchanges_boxes_between_neighbours(split: Split, make_set: MakeSet) -> None:
    """Pixels and targets are those of the step's box, for neighbours within each part; labels stay the images' own."""
    made = make_set()
    plain, mixing = _mix(split, [made]), _mix(split, [made], augmentation=Augmentation(cutmix=1.0))
    for step in range(6):
        before, after = plain.batch(step), mixing.batch(step)
        generator = Streams(0).numpy("mix/cutmix", step=step)
        generator.random()  # whether this batch is mixed
        stored = (before.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        expected, share = cut_and_paste(stored, draw_box(generator, 4, 4))
        assert torch.equal(after.images, as_images(expected))
        assert torch.equal(after.targets, torch.from_numpy(soften(before.labels.numpy(), 10, share)))
        assert torch.equal(after.labels, before.labels)
        assert after.targets.sum(1).tolist() == pytest.approx([1.0] * 10)


def test_cutmix_is_done_to_the_configured_share_of_batches(split: Split) -> None:
    """With a share of 0.3 about three batches in ten are mixed; targets are shares of classes in all of them."""
    mix = _mix(split, augmentation=Augmentation(cutmix=0.3))
    batches = [mix.batch(step) for step in range(300)]
    assert all(batch.targets.shape == (10, 10) for batch in batches)
    mixed = [bool((batch.targets.max(1).values < 1).any()) for batch in batches]
    plain = _mix(split)
    moved = [not torch.equal(plain.batch(step).images, batch.images) for step, batch in enumerate(batches)]
    assert np.mean(moved) == pytest.approx(0.3, abs=0.08)
    assert np.mean(mixed) == pytest.approx(0.3, abs=0.08)


# Reading ahead


def test_batches_are_the_batches_of_their_steps(split: Split, make_set: MakeSet) -> None:
    """What is made in the background is, step by step, what is made on demand, from any step on and to the last."""
    made = make_set(23, shard_size=4)
    mix, plain = _mix(split, [made], augmentation=ALL), _mix(split, [made], augmentation=ALL)
    found = list(mix.batches(3, 40))
    assert len(found) == 37
    assert all(_same(batch, plain.batch(step)) for step, batch in enumerate(found, start=3))
    assert list(mix.batches(5, 5)) == []


def test_resuming_gives_the_very_next_images(split: Split, make_set: MakeSet) -> None:
    """A fresh mix that begins in the middle of an epoch goes on as if nothing had happened."""
    made = make_set(23, shard_size=4)
    whole = list(_mix(split, [made], augmentation=ALL).batches(0, 20))
    resumed = list(_mix(split, [made], augmentation=ALL).batches(7, 20))
    assert all(_same(one, other) for one, other in zip(whole[7:], resumed, strict=True))


def test_an_error_in_the_background_reaches_the_caller(split: Split, make_set: MakeSet) -> None:
    """A damaged shard ends the loop over batches with its own error, and leaves no thread that makes batches."""
    made = make_set(23, shard_size=4)
    mix = _mix(split, [made])
    damage(Path(made.images.uri) / "shard-000003.npy")
    with pytest.raises(DataIntegrityError, match=r"shard-000003\.npy is damaged: expected sha256"):
        list(mix.batches(0, 20))
    mix.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_stopping_early_ends_the_background_work(split: Split, make_set: MakeSet) -> None:
    """A caller that leaves the loop leaves no thread behind."""
    batches = _mix(split, [make_set()]).batches(0, 1000)
    next(batches)
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]  # an iterator that is a generator
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_several_threads_may_ask_for_batches(split: Split, make_set: MakeSet) -> None:
    """Batches that are asked for at once, from different epochs, are each what they are alone."""
    made = make_set(6, shard_size=2)
    mix, plain = _mix(split, [made]), _mix(split, [made])
    steps = [(7 * k) % 60 for k in range(40)]
    with ThreadPoolExecutor(8) as askers:
        found = list(askers.map(mix.batch, steps))
    assert all(_same(batch, plain.batch(step)) for step, batch in zip(steps, found, strict=True))


# What does not fit


@pytest.mark.parametrize("num_synthetic", [4, 0])
def test_synthetic_images_and_their_number_belong_together(split: Split, make_set: MakeSet, num_synthetic: int) -> None:
    """Synthetic images that no batch would use, or a share of none, is refused."""
    sets = [] if num_synthetic else [make_set()]
    with pytest.raises(ValueError, match=f"expected synthetic images exactly when .* got num_synthetic={num_synthetic}"):
        Mix(split, sets, batch_size=10, num_synthetic=num_synthetic, gamma=0.5, num_classes=10, streams=Streams(0))


def test_synthetic_images_of_another_shape_are_refused(split: Split, make_set: MakeSet) -> None:
    """Images of a proxy that was fitted to another data set do not fit; the set is named."""
    made = make_set(shape=(5, 4, 1))
    with pytest.raises(ValueError, match=r"of shape \(4, 4, 1\), as the real ones, got \(5, 4, 1\) in ") as error:
        _mix(split, [made])
    assert made.images.uri in str(error.value)


def test_synthetic_images_of_other_classes_are_refused(split: Split, make_set: MakeSet) -> None:
    """Labels of eleven classes mean something else than those of ten."""
    with pytest.raises(DataIntegrityError, match="has labels of 11 classes, the real images have 10"):
        _mix(split, [make_set(num_classes=11)])


def test_a_set_that_would_get_no_image_is_refused(split: Split, make_set: MakeSet) -> None:
    """Four synthetic images by the weights 100 and 1 leave nothing for the second set: refused, not rounded."""
    with pytest.raises(ValueError, match=r"4 synthetic images in a batch cannot be split by the weights \(100\.0, 1\.0\)"):
        _mix(split, [make_set(weight=100.0), make_set(weight=1.0)])
