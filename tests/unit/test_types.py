"""The one conversion between stored and computed images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from proxyrob.storage.files import read_array, write_array
from proxyrob.types import ImageBatch, as_images, as_stored


def test_stored_images_become_float_images_in_channel_order() -> None:
    """uint8 NHWC becomes float32 NCHW in [0,1]: 0 is 0, 255 is 1, and no axis is mixed up."""
    stored = np.zeros((2, 3, 4, 2), np.uint8)
    stored[1, 2, 3, 0], stored[0, 1, 0, 1] = 255, 51
    images = as_images(stored)
    assert (images.dtype, images.shape, images.is_contiguous()) == (torch.float32, (2, 2, 3, 4), True)
    assert images[1, 0, 2, 3] == 1.0
    assert images[0, 1, 1, 0] == pytest.approx(0.2)
    assert float(images.sum()) == pytest.approx(1.2)


def test_all_256_levels_survive_the_way_there_and_back() -> None:
    """Storing what was read gives the same bytes, for every grey level."""
    stored = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert np.array_equal(as_stored(as_images(stored)), stored)


def test_storing_rounds_to_the_nearest_level_and_clips() -> None:
    """A value between two levels goes to the nearer one; outside [0,1] it goes to the border, and does not wrap around."""
    values = torch.tensor([-0.5, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.7]).view(1, 1, 1, 5)
    assert as_stored(values).flatten().tolist() == [0, 0, 1, 255, 255]


def test_storing_detaches_and_leaves_its_input_alone() -> None:
    """A tensor with a gradient can be stored, and is not changed."""
    images = torch.full((1, 1, 2, 2), 1.5, requires_grad=True)
    assert as_stored(images).max() == 255
    assert bool((images == 1.5).all())


def test_a_shard_that_is_mapped_into_memory_can_be_converted(tmp_path: Path) -> None:
    """Grey images of a mapped, read-only file are converted without a warning, and nothing can write into the file."""
    write_array(tmp_path / "shard.npy", np.full((1, 2, 2, 1), 100, np.uint8))
    stored = read_array(tmp_path / "shard.npy", mapped=True)
    as_images(stored).zero_()
    assert bool((stored == 100).all())


@pytest.mark.parametrize("channels", [1, 3])
def test_images_that_are_not_contiguous_are_converted_alike(channels: int) -> None:
    """A view with its axes in another order in memory, as augmentation gives, is read by its axes."""
    stored = np.random.default_rng(0).integers(0, 256, (4, channels, 3, 5), dtype=np.uint8).transpose(0, 2, 3, 1)
    images = as_images(stored, "cpu")
    assert images.is_contiguous()
    assert torch.equal(images, as_images(np.ascontiguousarray(stored)))
    assert np.array_equal(as_stored(images), stored)


def test_shapes_and_dtypes_are_enforced() -> None:
    """The tests run with shapes checked: float images are not accepted as stored ones, nor stored ones without channels."""
    with pytest.raises(TypeCheckError):
        as_images(np.zeros((1, 2, 2, 1), np.float32))  # pyright: ignore[reportArgumentType]  # that it fails is the point
    with pytest.raises(TypeCheckError):
        as_images(np.zeros((1, 2, 2), np.uint8))


def test_a_batch_has_as_many_images_as_labels() -> None:
    """The length of a batch is its number of images."""
    batch = ImageBatch(torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), np.arange(3))
    assert len(batch) == 3
    with pytest.raises(TypeCheckError):
        ImageBatch(torch.zeros(3, 1, 2, 2), torch.zeros(2, dtype=torch.int64), np.arange(3))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_the_strides_of_their_shape(channels: int) -> None:
    """Also images of one channel are laid out plane by plane: torch chooses how to convolve, and so to round, by strides."""
    images = as_images(np.zeros((2, 8, 4, channels), np.uint8))
    assert images.stride() == (channels * 32, 32, 4, 1)
