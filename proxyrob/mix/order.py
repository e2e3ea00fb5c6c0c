"""The order of images: a pure function of seed, epoch and position."""

import numpy as np
from jaxtyping import Int64

from proxyrob.rng import Streams


class EpochOrder:
    """Rows 0 … n-1 in a fresh order every epoch, each once per epoch.

    Nothing has to be saved for a resume: the rows at any position follow from the stream alone.

    Randomness: the named stream, by epoch.
    """

    def __init__(self, streams: Streams, path: str, size: int) -> None:
        if size < 1:
            raise ValueError(f"expected at least one image to draw from ({path}), got {size}")
        self.streams, self.path, self.size = streams, path, size
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def take(self, start: int, count: int) -> Int64[np.ndarray, " count"]:
        """The ``count`` rows from position ``start`` on, across the ends of epochs."""
        pieces = []
        while count > 0:
            epoch, offset = divmod(start, self.size)
            piece = self._permutation(epoch)[offset : offset + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _permutation(self, epoch: int) -> Int64[np.ndarray, " n"]:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.streams.numpy(self.path, epoch=epoch).permutation(self.size)
        return self._order
