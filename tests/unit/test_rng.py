"""Named random streams, and a global state that third parties cannot disturb."""

import random

import numpy as np
import pytest
import torch

from proxyrob.rng import Streams, isolated_rng


def _draw(seed: int = 0, path: str = "train/attack", **coordinates: int) -> list[float]:
    return torch.rand(4, generator=Streams(seed).torch(path, "cpu", **coordinates)).tolist()


def test_a_stream_is_decided_by_seed_path_and_coordinates() -> None:
    """The same name gives the same numbers; another seed, path, coordinate or coordinate's name gives others."""
    assert _draw(step=3) == _draw(step=3)
    others = [
        _draw(step=3),
        _draw(step=4),
        _draw(rank=3),
        _draw(),
        _draw(seed=1, step=3),
        _draw(path="train/attac", step=3),
        _draw(step=3, rank=0),
    ]
    assert len({tuple(numbers) for numbers in others}) == len(others)


def test_the_order_of_coordinates_does_not_matter() -> None:
    """Coordinates have names; their order in the call means nothing."""
    assert _draw(step=1, rank=2) == _draw(rank=2, step=1)
    assert _draw(step=1, rank=2) != _draw(step=2, rank=1)


def test_a_step_draws_the_same_numbers_whether_or_not_others_ran() -> None:
    """Step 3 of a resumed run equals step 3 of an uninterrupted one: drawing from other streams shifts nothing."""
    streams = Streams(0)
    uninterrupted = [torch.rand(2, generator=streams.torch("train/attack", step=step)).tolist() for step in range(5)]
    streams.torch("another/stream").initial_seed()
    assert torch.rand(2, generator=streams.torch("train/attack", step=3)).tolist() == uninterrupted[3]


def test_generators_are_fresh() -> None:
    """Two requests for one stream do not share a state: the second starts from the beginning."""
    streams = Streams(0)
    first, second = streams.torch("a"), streams.torch("a")
    torch.rand(10, generator=first)
    assert torch.rand(1, generator=second).item() == torch.rand(1, generator=streams.torch("a")).item()


def test_numpy_streams_follow_the_same_names() -> None:
    """Numpy's generators are decided by the name as torch's are."""
    streams = Streams(0)
    assert streams.numpy("mix", epoch=1).random() == streams.numpy("mix", epoch=1).random()
    assert streams.numpy("mix", epoch=1).random() != streams.numpy("mix", epoch=2).random()


def test_entropy_is_fixed_for_all_time() -> None:
    """Results of last year can be reproduced: the hash of a name is a 63-bit constant, not Python's salted hash."""
    assert Streams(0).entropy("train/attack", step=3) == 2873133572103387703
    assert all(0 <= Streams(seed).entropy("x") < 2**63 for seed in range(50))


def _global_states() -> tuple[object, ...]:
    legacy = np.random.get_state()  # noqa: NPY002  # the legacy state is what third parties draw from
    return random.getstate(), repr(legacy), torch.get_rng_state().tolist()


def _draw_globally() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002, S311  # stands for a third party


def _draw_and_fail() -> None:
    with isolated_rng(7):
        _draw_globally()
        raise RuntimeError("inside")


def test_isolated_rng_seeds_all_three_global_generators() -> None:
    """A third party that draws from random, numpy and torch gets the same numbers for the same seed, others for another."""
    with isolated_rng(7):
        first = _draw_globally()
    with isolated_rng(7):
        second = _draw_globally()
    with isolated_rng(8):
        other = _draw_globally()
    assert first == second
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_isolated_rng_restores_all_three_global_states() -> None:
    """Whoever draws globally outside does not notice that something was seeded inside."""
    before = _global_states()
    with isolated_rng(7):
        _draw_globally()
    assert _global_states() == before


def test_isolated_rng_restores_the_states_after_an_error() -> None:
    """An attack that raises leaves no seeded global state behind."""
    before = _global_states()
    with pytest.raises(RuntimeError, match="inside"):
        _draw_and_fail()
    assert _global_states() == before


def test_isolated_rng_takes_63_bit_seeds() -> None:
    """Numpy's legacy generator takes 32 bits only; a stream's entropy is accepted all the same."""
    with isolated_rng(Streams(0).entropy("evaluate/autoattack")):
        first = _draw_globally()
    with isolated_rng(Streams(0).entropy("evaluate/autoattack")):
        assert _draw_globally() == first
