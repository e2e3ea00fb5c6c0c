"""Less memory for a batch that has to stay whole: the inside of blocks is computed again when the gradient is taken."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(model: nn.Module, *, when: bool) -> Iterator[None]:
    """Keep only what goes into each block of ``model`` (a module with several convolutions of its own), for the block.

    The gradient is the same bit for bit, and running statistics move once (Chen et al. 2016, through torch's
    ``checkpoint``). It is how a batch fits into less memory where batch normalisation needs all of it at once.
    """
    blocks = [block for block in model.modules() if sum(isinstance(part, _ConvNd) for part in block.children()) > 1]
    if not when:
        yield
        return
    for block in blocks:

        def twice(block: nn.Module = block) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _unmoved(block)

        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=twice, determinism_check="none"
        )
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # what its class has comes back


@contextmanager
def _unmoved(block: nn.Module) -> Iterator[None]:
    """Running statistics take part, as they did the first time, and stay: they move by 0 times the difference."""
    layers = [layer for layer in block.modules() if isinstance(layer, _BatchNorm)]
    before = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum, layer.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for layer, (momentum, count) in zip(layers, before, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, count
