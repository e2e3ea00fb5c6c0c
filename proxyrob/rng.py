"""Named random streams: every use of randomness has a path, and the path alone decides its numbers."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Streams:
    """Random streams under one root seed.

    A stream is named by a path and integer coordinates (``streams.torch("train/attack", step=3)``). The pair is hashed
    into a seed, so adding a stream never shifts another, and step 3 draws the same numbers whether or not steps 0–2 ran
    in this process: nothing has to be saved for an exact resume.
    """

    seed: int

    def entropy(self, path: str, **coordinates: int) -> int:
        """A 63-bit integer that depends on the root seed, the path and the coordinates."""
        name = json.dumps([self.seed, path, sorted(coordinates.items())])
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1

    def torch(self, path: str, device: torch.device | str = "cpu", **coordinates: int) -> torch.Generator:
        """A fresh generator for one use; ``device`` must be the device it draws on."""
        return torch.Generator(device=device).manual_seed(self.entropy(path, **coordinates))

    def numpy(self, path: str, **coordinates: int) -> np.random.Generator:
        """A fresh numpy generator for one use."""
        return np.random.default_rng(self.entropy(path, **coordinates))


@dataclass(frozen=True)
class RowGenerator:
    """Draws for every image of a batch and hands out those of ``rows``.

    An image sees the same numbers whichever process or part of the batch it is in; ``total`` is the size of the batch.
    """

    generator: torch.Generator
    rows: slice | Tensor
    total: int


AnyGenerator = torch.Generator | RowGenerator


def draw(
    shape: tuple[int, ...], like: Tensor, generator: AnyGenerator, fill: Callable[[Tensor, torch.Generator], Tensor]
) -> Tensor:
    """A tensor of ``shape``, filled in place by ``fill``, of the type and device of ``like``.

    The first dimension counts images.
    """
    if isinstance(generator, RowGenerator):
        return fill(like.new_empty((generator.total, *shape[1:])), generator.generator)[generator.rows]
    return fill(like.new_empty(shape), generator)


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed the global generators for a third party that draws from them, and restore them afterwards."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    cuda_devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=cuda_devices):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
