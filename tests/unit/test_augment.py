"""Augmentation of whole batches against plain loops over single images."""

import numpy as np
import pytest

from proxyrob.mix import cut_and_paste, shift_and_mirror
from proxyrob.mix.augment import draw_box, soften


def _images(count: int, shape: tuple[int, int, int] = (4, 6, 2)) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (count, *shape), dtype=np.uint8)


def _by_hand(image: np.ndarray, row: int, column: int, mirrored: bool, most: int) -> np.ndarray:
    """One image, mirrored, padded with black and cut out, as it would be written for one image."""
    height, width, _ = image.shape
    padded = np.pad(image[:, ::-1] if mirrored else image, ((most, most), (most, most), (0, 0)))
    return padded[row : row + height, column : column + width]


@pytest.mark.parametrize("most", [0, 1, 2, 5])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_crop_and_flip_equal_a_plain_loop(most: int, channels: int) -> None:
    """Every image is mirrored and moved as one image alone would be, alike in all channels, black where nothing moved in."""
    rng, images = np.random.default_rng(most), _images(40, (4, 6, channels))
    before = images.copy()
    offsets, mirrored = rng.integers(0, 2 * most + 1, (2, 40)), rng.random(40) < 0.5
    moved = shift_and_mirror(images, offsets, mirrored, most)
    expected = [_by_hand(images[k], offsets[0, k], offsets[1, k], mirrored[k], most) for k in range(40)]
    assert (moved.dtype, moved.shape) == (np.uint8, images.shape)
    assert np.array_equal(moved, np.stack(expected))
    assert np.array_equal(images, before), "the stored images are not touched"


def test_the_middle_offset_moves_nothing() -> None:
    """At the middle of the frame and unmirrored, images stay as they are, also those of a read-only file."""
    images = _images(3)
    images.flags.writeable = False
    assert np.array_equal(shift_and_mirror(images, np.full((2, 3), 2), np.zeros(3, bool), 2), images)


def test_an_offset_below_the_middle_moves_down_and_right() -> None:
    """Offset 0 cuts at the frame's upper left: the image moves down and to the right by the whole shift."""
    image = np.zeros((1, 3, 3, 1), np.uint8)
    image[0, 0, 0] = 9
    moved = shift_and_mirror(image, np.zeros((2, 1), np.int64), np.zeros(1, bool), 1)
    assert np.argwhere(moved).tolist() == [[0, 1, 1, 0]]


def test_neighbours_exchange_the_box() -> None:
    """Inside the box each image has its neighbour's pixels, outside its own; the share is the box's share of the pixels."""
    images, (top, bottom, left, right) = _images(6), (1, 3, 0, 5)
    mixed, share = cut_and_paste(images, (top, bottom, left, right))
    assert share == 10 / 24
    for k in range(6):
        expected = images[k].copy()
        expected[top:bottom, left:right] = images[k ^ 1][top:bottom, left:right]
        assert np.array_equal(mixed[k], expected)


@pytest.mark.parametrize(("box", "share"), [((0, 4, 0, 6), 1.0), ((2, 2, 1, 4), 0.0)])
def test_a_box_may_be_everything_or_nothing(box: tuple[int, int, int, int], share: float) -> None:
    """The whole image exchanges neighbours, an empty box leaves all as it is, and the shares are exact."""
    images = _images(4)
    mixed, found = cut_and_paste(images, box)
    assert found == share
    assert np.array_equal(mixed, images[[1, 0, 3, 2]] if share else images)


def test_images_that_are_not_contiguous_are_cut_alike() -> None:
    """The views that shifting gives have their axes in another order in memory: their pixels are exchanged all the same."""
    images = _images(4, (4, 4, 3))
    view = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    assert np.array_equal(cut_and_paste(view, (0, 2, 1, 3))[0], cut_and_paste(images, (0, 2, 1, 3))[0])


def test_labels_are_shared_as_the_pixels_are() -> None:
    """Each image's own class has what it kept, its neighbour's what it got; equal classes have all."""
    soft = soften(np.array([0, 2, 1, 1]), 3, 0.25)
    assert soft.tolist() == [[0.75, 0, 0.25], [0.25, 0, 0.75], [0, 1, 0], [0, 1, 0]]
    assert soft.dtype == np.float32


def test_boxes_stay_inside_and_have_a_uniform_area_before_clipping() -> None:
    """Every box lies in the image, and their mean area is that of a uniform area around a uniform centre, cut off."""
    rng = np.random.default_rng(0)
    boxes = [draw_box(rng, 64, 48) for _ in range(4000)]
    assert all(0 <= top <= bottom <= 64 and 0 <= left <= right <= 48 for top, bottom, left, right in boxes)
    shares = np.array([(bottom - top) * (right - left) for top, bottom, left, right in boxes]) / (64 * 48)
    # a side of s keeps 1 - s/4 of its length on average after clipping, in both directions: E[s²(1 - s/4)²], s² uniform
    assert shares.mean() == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.02)
    centres = np.array([top + bottom for top, bottom, _, _ in boxes]) / 2
    assert centres.mean() == pytest.approx(32, abs=1)
