"""Votes: the classes that a model gives to noisy copies of an image."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


def count_votes(
    model: nn.Module, image: Float[Tensor, "c h w"], sigma: float, n: int, batch_size: int, generator: torch.Generator
) -> Int64[Tensor, " k"]:
    """How often each class is predicted for ``n`` noisy copies of an image.

    Randomness: n · c · h · w normal deviates from ``generator``; batches of another size may draw other deviates.
    """
    return count_votes_of_several(model, image[None], sigma, n, batch_size, [generator])[0]


@torch.inference_mode()
def count_votes_of_several(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    sigma: float,
    n: int,
    batch_size: int,
    generators: list[torch.Generator],
) -> Int64[Tensor, "b k"]:
    """How often each class is predicted for ``n`` noisy copies of each image; the copies of several images share a batch.

    Nothing waits for the device. The noise is not clipped to [0,1].

    Randomness: for each image n · c · h · w normal deviates from its own generator, in pieces of at most ``batch_size``
    copies; they do not depend on the images beside it.

    Raises ``ValueError`` where there is no sample, or not one generator for each image.
    """
    if n < 1 or len(images) != len(generators) or not generators:
        raise ValueError(f"expected at least one sample, got n={n} for {len(images)} images and {len(generators)} generators")
    votes: Int64[Tensor, "b k"] | None = None
    for pieces in _fill_batches(len(images), n, batch_size):
        batch = images.new_empty((sum(size for _, size in pieces), *images.shape[1:]))
        for (index, _), noise in zip(pieces, batch.split([size for _, size in pieces]), strict=True):
            noise.normal_(generator=generators[index]).mul_(sigma).add_(images[index])
        logits = model(batch)
        if votes is None:
            votes = torch.zeros((len(images), logits.shape[1]), dtype=torch.int64, device=images.device)
        predicted = logits.argmax(1)
        for (index, _), classes in zip(pieces, predicted.split([size for _, size in pieces]), strict=True):
            votes[index].scatter_add_(0, classes, torch.ones_like(classes))
    assert votes is not None  # there is an image and a sample of it
    return votes


def _fill_batches(num_images: int, n: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """Batches of at most ``batch_size`` copies, each a list of (image, number of copies)."""
    batches: list[list[tuple[int, int]]] = []
    room = 0
    for index in range(num_images):
        for start in range(0, n, batch_size):
            size = min(batch_size, n - start)
            if size > room:
                batches.append([])
                room = batch_size
            batches[-1].append((index, size))
            room -= size
    return batches
