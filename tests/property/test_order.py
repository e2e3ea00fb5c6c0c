"""The order of images, for any size and position."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from proxyrob.mix import EpochOrder
from proxyrob.rng import Streams

sizes, seeds = st.integers(1, 40), st.integers(0, 2**32)


def _order(seed: int, size: int, path: str = "mix/real") -> EpochOrder:
    return EpochOrder(Streams(seed), path, size)


@given(seeds, sizes, st.integers(0, 20))
def test_every_row_comes_once_per_epoch(seed: int, size: int, epoch: int) -> None:
    """Any epoch is a permutation of all rows."""
    assert sorted(_order(seed, size).take(epoch * size, size).tolist()) == list(range(size))


@given(seeds, sizes, st.integers(0, 200), st.integers(0, 100))
def test_a_piece_is_its_single_rows(seed: int, size: int, start: int, count: int) -> None:
    """Taking many rows is taking each alone, across the ends of epochs and from a fresh order at every position."""
    piece = _order(seed, size).take(start, count)
    assert (piece.dtype, len(piece)) == (np.int64, count)
    alone = [int(_order(seed, size).take(position, 1)[0]) for position in range(start, start + count)]
    assert piece.tolist() == alone


@given(seeds, sizes, st.lists(st.tuples(st.integers(0, 100), st.integers(0, 50)), min_size=1, max_size=8))
def test_what_was_taken_before_does_not_matter(seed: int, size: int, places: list[tuple[int, int]]) -> None:
    """An order that jumps about gives the same rows as a fresh one: nothing has to be saved for a resume."""
    used = _order(seed, size)
    for start, count in places:
        assert np.array_equal(used.take(start, count), _order(seed, size).take(start, count))


@given(seeds, st.integers(20, 40))
def test_epochs_and_paths_differ(seed: int, size: int) -> None:
    """Two epochs, or two parts of a mix, are not in the same order."""
    first, second = (_order(seed, size).take(epoch * size, size) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, _order(seed, size, "mix/synthetic").take(0, size))
