"""Schedules of the learning rate and of weight averaging."""

import math

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from proxyrob.schedule import average_with_warmup, cosine_with_warmup, one_cycle, piecewise


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


def _sgd() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2, momentum=0.9)


def _course(optimizer: torch.optim.Optimizer, schedule: LRScheduler, steps: int) -> Tensor:
    """Rate and momentum of each step."""
    course = []
    for _ in range(steps):
        (group,) = optimizer.param_groups
        course.append([float(group["lr"]), float(group["momentum"])])
        optimizer.step()
        schedule.step()
    return torch.tensor(course, dtype=torch.float64)


def test_a_cosine_without_warmup_is_torchs() -> None:
    """With an end above 0, as in the paper's training: torch's CosineAnnealingLR with that least rate."""
    ours, theirs = _sgd(), _sgd()
    expected = _course(theirs, CosineAnnealingLR(theirs, 50, eta_min=0.002), 50)
    assert torch.allclose(_course(ours, cosine_with_warmup(ours, 50, 0.0, 0.01), 50), expected)


@pytest.mark.parametrize(("steps", "share"), [(400, 0.025), (33, 0.3), (7, 0.025), (2, 0.9)])
@pytest.mark.parametrize("cycles_momentum", [True, False])
def test_one_cycle_is_torchs(steps: int, share: float, cycles_momentum: bool) -> None:
    """Rate and momentum of every step are those of torch's OneCycleLR with its own defaults."""
    ours, theirs = _sgd(), _sgd()
    reference = OneCycleLR(theirs, max_lr=0.2, total_steps=steps, pct_start=share, cycle_momentum=cycles_momentum)
    schedule = one_cycle(
        ours, steps, warmup_share=share, initial_factor=0.04, final_factor=4e-6, cycles_momentum=cycles_momentum
    )
    assert torch.allclose(_course(ours, schedule, steps), _course(theirs, reference, steps), atol=0.0)


@pytest.mark.parametrize(("steps", "share"), [(40, 0.025), (2, 0.5), (1, 0.025)])
def test_a_growth_of_one_step_is_over_at_once(steps: int, share: float) -> None:
    """Where torch's own would divide by zero the first step has the full rate, and the last the least."""
    optimizer = _sgd()
    schedule = one_cycle(optimizer, steps, warmup_share=share, initial_factor=0.04, final_factor=4e-6, cycles_momentum=True)
    course = _course(optimizer, schedule, steps)
    if steps > 1:
        assert course[0].tolist() == pytest.approx([0.2, 0.85])
    assert course[-1, 0].item() == pytest.approx(0.2 * 4e-6, abs=1e-9)


def test_a_piecewise_rate_is_torchs() -> None:
    """Milestones at half and three quarters of 40 steps are torch's MultiStepLR at 20 and 30."""
    ours, theirs = _sgd(), _sgd()
    found = _course(ours, piecewise(ours, 40, (0.5, 0.75), 0.1), 40)
    assert torch.allclose(found, _course(theirs, MultiStepLR(theirs, [20, 30], 0.1), 40))


def test_the_average_waits_for_its_delay() -> None:
    """Before the delay the average is the weights; at the delay it begins as a fresh one does."""
    for updates, kept in ((1, 0.0), (99, 0.0), (100, 1 / 10), (105, 6 / 15), (9000, 0.9)):
        averages, weights = [torch.tensor([2.0, 4.0])], [torch.tensor([1.0, 8.0])]
        average_with_warmup(0.9, delay=100)(averages, weights, updates)
        assert averages[0].tolist() == pytest.approx([kept * 2 + (1 - kept) * 1, kept * 4 + (1 - kept) * 8])
