"""Random streams, for any names."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from proxyrob.rng import Streams

seeds = st.integers(0, 2**64)
paths = st.text(st.characters(codec="utf-8"), max_size=20)
coordinates = st.dictionaries(st.sampled_from(["step", "rank", "image", "epoch"]), st.integers(0, 2**40), max_size=3)
names = st.tuples(seeds, paths, coordinates)


@given(names, names)
def test_different_names_have_different_streams(
    one: tuple[int, str, dict[str, int]], other: tuple[int, str, dict[str, int]]
) -> None:
    """No seed, path or coordinate can be traded for another: different triples have different entropy, equal ones equal."""
    first, second = (Streams(seed).entropy(path, **given_to) for seed, path, given_to in (one, other))
    assert (first == second) == (one == other)


@given(names)
def test_entropy_fits_every_generator(name: tuple[int, str, dict[str, int]]) -> None:
    """63 bits, not negative."""
    seed, path, given_to = name
    assert 0 <= Streams(seed).entropy(path, **given_to) < 2**63


@given(seeds, st.lists(paths, min_size=2, max_size=6, unique=True))
def test_drawing_from_one_stream_shifts_no_other(seed: int, many: list[str]) -> None:
    """However much is drawn from the others, and in whatever order streams are asked for, a stream is the same."""
    assume(len(many) > 1)
    streams = Streams(seed)
    alone = {path: torch.rand(2, generator=Streams(seed).torch(path)).tolist() for path in many}
    for path in reversed(many):
        generator = streams.torch(path)
        assert torch.rand(2, generator=generator).tolist() == alone[path]
        torch.rand(100, generator=generator)


@given(paths, paths, st.integers(0, 9), st.integers(0, 9))
def test_a_path_cannot_imitate_a_coordinate(path: str, other: str, step: int, rank: int) -> None:
    """Writing a coordinate into the path names another stream."""
    streams = Streams(0)
    assert streams.entropy(f"{path}/{step}") != streams.entropy(path, step=step)
    assume(step != rank)
    assert streams.entropy(other, step=step, rank=rank) != streams.entropy(other, step=rank, rank=step)
