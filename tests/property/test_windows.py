"""The order of rows of many files, for any sizes of files and windows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from proxyrob.mix import EpochOrder, WindowOrder
from proxyrob.mix.order import Window
from proxyrob.rng import Streams

PATH = "mix/synthetic"

counts = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)
windows, seeds = st.integers(1, 60), st.integers(0, 2**32)


def _order(seed: int, sizes: list[int], window: int) -> WindowOrder:
    return WindowOrder(Streams(seed), PATH, np.array(sizes, np.int64), window)


def _rows(order: WindowOrder, start: int, count: int) -> list[tuple[int, int]]:
    """(file, row in that file) at each position."""
    found = []
    for window, first, number in order.pieces(start, count):
        inside = [(int(file), row) for file in window.parts for row in range(order.counts[file])]
        found += [inside[place] for place in order.permutation(window)[first : first + number]]
    return found


@given(seeds, counts, windows, st.integers(0, 5))
def test_every_row_comes_once_per_epoch(seed: int, sizes: list[int], window: int, epoch: int) -> None:
    """Any epoch has every row of every file exactly once, whatever the sizes of files and windows."""
    order = _order(seed, sizes, window)
    rows = _rows(order, epoch * order.size, order.size)
    assert sorted(rows) == [(file, row) for file, size in enumerate(sizes) for row in range(size)]


@given(seeds, counts, windows, st.integers(0, 200), st.integers(0, 60))
def test_a_piece_is_its_single_rows(seed: int, sizes: list[int], window: int, start: int, count: int) -> None:
    """Rows are a pure function of the position: taken together or each alone from a fresh order, across windows and epochs."""
    alone = [_rows(_order(seed, sizes, window), position, 1)[0] for position in range(start, start + count)]
    assert _rows(_order(seed, sizes, window), start, count) == alone


@given(seeds, counts, windows, st.lists(st.tuples(st.integers(0, 100), st.integers(1, 50)), min_size=1, max_size=6))
def test_what_was_taken_before_does_not_matter(seed: int, sizes: list[int], window: int, places: list[tuple[int, int]]) -> None:
    """An order that jumps about gives the rows of a fresh one: nothing has to be saved for a resume."""
    used = _order(seed, sizes, window)
    for start, count in places:
        assert _rows(used, start, count) == _rows(_order(seed, sizes, window), start, count)


@given(seeds, counts, st.integers(0, 3))
def test_a_set_in_one_window_is_in_the_order_of_an_epoch(seed: int, sizes: list[int], epoch: int) -> None:
    """A set that fits into a window has the very order that it would have as a single file."""
    order = _order(seed, sizes, sum(sizes))
    whole = EpochOrder(Streams(seed), PATH, sum(sizes)).take(epoch * order.size, order.size)
    rows = [(file, row) for file, size in enumerate(sizes) for row in range(size)]
    assert _rows(order, epoch * order.size, order.size) == [rows[place] for place in whole]


@given(seeds, counts, windows, st.integers(0, 3))
def test_windows_cover_an_epoch_with_few_files_each(seed: int, sizes: list[int], window: int, epoch: int) -> None:
    """Windows follow each other without gaps, and each but the last is full with its last file and not before it."""
    order = _order(seed, sizes, window)
    found = order.windows(epoch)
    assert [of.first for of in found] == np.cumsum([0, *(of.size for of in found)])[:-1].tolist()
    assert sum(of.size for of in found) == order.size
    if len(found) == 1:
        return
    for number, of in enumerate(found):
        assert (of.epoch, of.number, of.size) == (epoch, number, order.counts[of.parts].sum())
        assert order.counts[of.parts[:-1]].sum() < window
        assert of.size >= window or of is found[-1]


@given(seeds)
def test_epochs_and_windows_differ(seed: int) -> None:
    """Two epochs take the files in another order, and windows of the same size their rows."""
    order = _order(seed, [8] * 12, 32)
    epochs = [_rows(order, epoch * order.size, order.size) for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    files = [[set(of.parts.tolist()) for of in order.windows(epoch)] for epoch in range(4)]
    assert any(files[0] != other for other in files[1:])
    inside = [order.permutation(Window(0, number, np.arange(4), 32 * number, 32)).tolist() for number in range(3)]
    assert inside[0] != inside[1] != inside[2]
