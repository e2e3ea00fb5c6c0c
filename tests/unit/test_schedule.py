"""Schedules of the learning rate and of weight averaging."""

import math

import pytest
import torch

from proxyrob.schedule import average_with_warmup, cosine_with_warmup


def _rates(steps: int, warmup_share: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = cosine_with_warmup(optimizer, steps, warmup_share)
    rates = []
    for _ in range(steps):
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return [*rates, float(schedule.get_last_lr()[0])]


def test_the_rate_grows_linearly_then_follows_half_a_cosine_to_zero() -> None:
    """Every step's rate is that of the formula: growth over the first fifth, times half a cosine, 0 after the last step."""
    expected = [2.0 * min(1.0, (step + 1) / 4) * 0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(21)]
    assert _rates(20, 0.2) == pytest.approx(expected)
    assert expected[-1] == 0.0


def test_a_short_training_starts_at_the_full_rate() -> None:
    """With too few steps for a warm-up the first step already has the full rate, and nothing is divided by zero."""
    assert _rates(2, 1 / 30) == pytest.approx([2.0, 1.0, 0.0])


def test_the_rate_stays_at_zero_after_the_end() -> None:
    """A step too many does not make the rate rise again."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = cosine_with_warmup(optimizer, 2, 0.5)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [0.0]


def test_the_average_forgets_its_first_weights_quickly() -> None:
    """At update t the old average keeps min(decay, (1+t)/(10+t)): little at first, ``decay`` in the end."""
    for updates, kept in ((1, 2 / 11), (5, 6 / 15), (1000, 0.9)):
        averages, weights = [torch.tensor([2.0, 4.0])], [torch.tensor([1.0, 8.0])]
        average_with_warmup(0.9)(averages, weights, updates)
        assert averages[0].tolist() == pytest.approx([kept * 2 + (1 - kept) * 1, kept * 4 + (1 - kept) * 8])
        assert weights[0].tolist() == [1.0, 8.0]
