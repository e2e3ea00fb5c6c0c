"""Augmentation of stored images: translation, mirroring and CutMix, on whole batches at once."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from numpy.lib.stride_tricks import as_strided


def shift_and_mirror(
    images: UInt8[np.ndarray, "b h w c"],
    offsets: Int64[np.ndarray, "2 b"],
    mirrored: Bool[np.ndarray, " b"],
    most: int,
) -> UInt8[np.ndarray, "b h w c"]:
    """Mirror the chosen images left to right, then cut each out of a frame of ``most`` black pixels at its offset.

    ``offsets`` are the row and column of the cut, 0 to 2·most; ``most`` is the middle, which moves nothing. For 32×32 and
    most = 4 this is the crop and flip that training on CIFAR-10 has had since He et al. 2016.
    """
    b, h, w, c = images.shape
    if most == 0:
        moved = images.copy()
    else:
        framed = np.zeros((b, h + 2 * most, w + 2 * most, c), np.uint8)
        framed[:, most : most + h, most : most + w] = images
        image, row, column, byte = framed.strides
        places = 2 * most + 1
        cuts = as_strided(framed, (b, places, places, h, w * c), (image, row, column, row, byte), writeable=False)
        columns = np.where(mirrored, 2 * most - offsets[1], offsets[1])  # what is mirrored afterwards moves the other way
        moved = cuts[np.arange(b), offsets[0], columns].reshape(b, h, w, c)
    if mirrored.any():
        chosen = np.flatnonzero(mirrored)
        pixels = torch.from_numpy(moved[chosen]).permute(0, 3, 1, 2)
        moved[chosen] = pixels.flip(3).permute(0, 2, 3, 1).numpy()  # torch moves whole pixels, numpy single bytes
    return moved


def cut_and_paste(
    images: UInt8[np.ndarray, "b h w c"], box: tuple[int, int, int, int]
) -> tuple[UInt8[np.ndarray, "b h w c"], float]:
    """CutMix (Yun et al. 2019): neighbours (0 and 1, 2 and 3, …) exchange the box (top, bottom, left, right).

    Returns the images and the exact share of each that now comes from its neighbour. The batch has an even number of
    images: neighbours are random because the order is.
    """
    top, bottom, left, right = box
    pairs = images.reshape(-1, 2, *images.shape[1:])
    mixed = pairs.copy()
    mixed[:, :, top:bottom, left:right] = pairs[:, ::-1, top:bottom, left:right]
    share = (bottom - top) * (right - left) / (images.shape[1] * images.shape[2])
    return mixed.reshape(images.shape), share


def draw_box(generator: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """The box of Yun et al. 2019: its area is uniform, its centre is uniform, what sticks out is cut off."""
    side = float(np.sqrt(generator.random()))
    row, column = int(generator.integers(height)), int(generator.integers(width))
    rows, columns = round(height * side), round(width * side)
    top, left = max(0, row - rows // 2), max(0, column - columns // 2)
    return top, min(height, row + (rows + 1) // 2), left, min(width, column + (columns + 1) // 2)


def soften(labels: Int64[np.ndarray, " b"], num_classes: int, share: float) -> Float[np.ndarray, "b k"]:
    """The classes of images after ``cut_and_paste``: each image's own, and its neighbour's by ``share``."""
    own = np.eye(num_classes, dtype=np.float32)[labels]
    pairs = own.reshape(-1, 2, num_classes)
    return ((1.0 - share) * pairs + share * pairs[:, ::-1]).reshape(own.shape).astype(np.float32)
