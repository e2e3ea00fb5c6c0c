"""The order of images: a pure function of seed, epoch and position."""

from dataclasses import dataclass

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


WINDOW = 1 << 18
"""Rows that are shuffled together: enough that neighbours in a batch come from everywhere, few enough that the files they
lie in fit into memory and into a cache."""


@dataclass(frozen=True)
class Window:
    """Consecutive pieces of an epoch; ``parts`` are their numbers, ``first`` the window's first position in the epoch."""

    epoch: int
    number: int
    parts: Int64[np.ndarray, " p"]
    first: int
    size: int


class WindowOrder:
    """Rows of many files in a fresh order every epoch, each once per epoch, so that few files are open at a time.

    The files are put into a random order and cut into windows of at least ``window`` rows (the last is what is left over);
    within a window the rows are in random order. A set that fits into one window is shuffled whole, as ``EpochOrder`` does
    it, in the same order. Nothing has to be saved for a resume.

    Randomness: the named stream by epoch, and with ``/window`` by epoch and window.
    """

    def __init__(self, streams: Streams, path: str, counts: Int64[np.ndarray, " files"], window: int = WINDOW) -> None:
        self.size = int(counts.sum())
        if self.size < 1:
            raise ValueError(f"expected at least one image to draw from ({path}), got none")
        self.streams, self.path, self.counts, self.window = streams, path, counts, window
        self._windows: dict[int, list[Window]] = {}

    def pieces(self, start: int, count: int) -> list[tuple[Window, int, int]]:
        """Which part of which windows the positions from ``start`` on are: (window, first place in it, number of places)."""
        found = []
        while count > 0:
            epoch, offset = divmod(start, self.size)
            for window in self.windows(epoch):
                inside = offset - window.first
                if inside < window.size:
                    taken = min(count, window.size - inside)
                    found.append((window, inside, taken))
                    start, count = start + taken, count - taken
                    break
        return found

    def windows(self, epoch: int) -> list[Window]:
        """The windows of an epoch, in order."""
        if epoch not in self._windows:
            near = {known: windows for known, windows in self._windows.items() if abs(known - epoch) == 1}
            self._windows = near | {epoch: self._cut(epoch)}  # at an epoch's end the next one is asked for again and again
        return self._windows[epoch]

    def permutation(self, window: Window) -> Int64[np.ndarray, " n"]:
        """The order of the rows inside a window."""
        if window.size == self.size:
            return self.streams.numpy(self.path, epoch=window.epoch).permutation(self.size)
        return self.streams.numpy(f"{self.path}/window", epoch=window.epoch, window=window.number).permutation(window.size)

    def _cut(self, epoch: int) -> list[Window]:
        if self.size <= self.window:
            return [Window(epoch, 0, np.arange(len(self.counts)), 0, self.size)]
        order = self.streams.numpy(self.path, epoch=epoch).permutation(len(self.counts))
        ends = np.cumsum(self.counts[order])
        windows, begin, first = [], 0, 0
        while first < self.size:
            end = min(int(np.searchsorted(ends, first + self.window)) + 1, len(order))
            size = int(ends[end - 1]) - first
            windows.append(Window(epoch, len(windows), order[begin:end], first, size))
            begin, first = end, first + size
        return windows
