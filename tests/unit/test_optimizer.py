"""From the configuration to optimizer, schedule, clipping and average."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from proxyrob.config import (
    AdamWOptimizer,
    CosineSchedule,
    OneCycleSchedule,
    PiecewiseSchedule,
    RobustTrainConfig,
    SgdOptimizer,
)
from proxyrob.schedule import average_with_warmup, cosine_with_warmup
from proxyrob.train import build_average, build_optimizer, clip_gradients
from tests.toys import random_images, same_state


def _config(**values: Any) -> RobustTrainConfig:
    return RobustTrainConfig(**{"synthetic_fraction": 0.0, "gamma": 1.0, "steps": 20, **values})


def _model() -> nn.Sequential:
    """Layers of each kind that decays or does not, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 10))


def _names(model: nn.Module, group: dict[str, Any]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if any(parameter is one for one in group["params"])}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    images = random_images(6).to(next(model.parameters()).dtype)
    nn.functional.cross_entropy(model(images), torch.arange(6)).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("decayed", "spared"),
    [
        ("all", set()),
        ("no-normalisation", {"1.weight", "1.bias", "2.weight", "2.bias"}),
        ("weights", {"0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "4.bias"}),
    ],
)
@pytest.mark.parametrize("kind", [SgdOptimizer, AdamWOptimizer])
def test_weight_decay_spares_what_it_is_to_spare(
    kind: type[SgdOptimizer] | type[AdamWOptimizer], decayed: Any, spared: set[str]
) -> None:
    """Every parameter is in one group: those that decay, and those of normalisation layers and biases as configured."""
    model = _model()
    optimizer, _ = build_optimizer(_config(weight_decay=0.1, optimizer=kind(decayed=decayed)), model)
    shrunk, *rest = optimizer.param_groups
    everything = {name for name, _ in model.named_parameters()}
    assert (_names(model, shrunk), shrunk["weight_decay"]) == (everything - spared, 0.1)
    assert [(_names(model, group), group["weight_decay"]) for group in rest] == ([(spared, 0.0)] if spared else [])


def test_each_optimizer_has_the_defaults_of_its_field() -> None:
    """SGD decays weights alone, with Nesterov's momentum 0.9; AdamW decays all."""
    assert (SgdOptimizer().momentum, SgdOptimizer().nesterov, SgdOptimizer().decayed) == (0.9, True, "weights")
    assert AdamWOptimizer().decayed == "all"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            _config(learning_rate=0.1, weight_decay=5e-4, optimizer=SgdOptimizer(decayed="all")),
            lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        ),
        (
            _config(learning_rate=0.1, weight_decay=0.0, optimizer=SgdOptimizer(momentum=0.5, nesterov=False)),
            lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.5),
        ),
        (_config(), lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=5e-4)),
    ],
    ids=["nesterov", "momentum", "adamw"],
)
def test_the_updates_are_torchs(config: RobustTrainConfig, expected: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Five steps, with the schedule aside, give the weights that torch's optimizer gives, written out."""
    model, other = _model().double(), _model().double()
    ours, _ = build_optimizer(config.replace(schedule=CosineSchedule(warmup_share=0.0)), model)
    theirs = expected(other.parameters())
    for _ in range(5):
        _step(model, ours)
        _step(other, theirs)
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, another, atol=1e-9)


def test_the_defaults_are_adamw_and_a_cosine_bit_for_bit() -> None:
    """The configuration that says nothing gives the optimizer, schedule and average that results were measured with."""
    model, other, config = _model(), _model(), _config()
    ours, schedule = build_optimizer(config, model)
    average = build_average(config, model)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=5e-4, fused=True)
    their_schedule = cosine_with_warmup(theirs, 20)
    their_average = AveragedModel(other, multi_avg_fn=average_with_warmup(0.99))
    assert ours.state_dict() == theirs.state_dict()
    for _ in range(20):
        _step(model, ours)
        _step(other, theirs)
        average.update_parameters(model)
        their_average.update_parameters(other)
        schedule.step()
        their_schedule.step()
        assert schedule.get_last_lr() == their_schedule.get_last_lr()
    assert same_state(model.state_dict(), other.state_dict())
    assert same_state(average.state_dict(), their_average.state_dict())


@pytest.mark.parametrize("optimizer", [SgdOptimizer(), AdamWOptimizer()], ids=["sgd", "adamw"])
@pytest.mark.parametrize(
    "schedule",
    [
        CosineSchedule(warmup_share=0.0, final_factor=0.01),
        OneCycleSchedule(),
        OneCycleSchedule(cycles_momentum=False),
        PiecewiseSchedule(),
    ],
    ids=["cosine", "one-cycle", "one-cycle-of-the-rate", "piecewise"],
)
def test_a_schedule_goes_on_from_its_checkpoint(optimizer: SgdOptimizer | AdamWOptimizer, schedule: Any) -> None:
    """States that are stored after 8 of 20 steps and loaded into fresh objects give the same weights and rates."""
    config = _config(optimizer=optimizer, schedule=schedule, learning_rate=0.05)

    def run(model: nn.Module, parts: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            _step(model, parts[0])
            rates.append(float(parts[1].get_last_lr()[0]))
            parts[1].step()
        return rates

    one, other = _model(), _model()
    whole = run(one, build_optimizer(config, one), 20)
    parts = build_optimizer(config, other)
    before = run(other, parts, 8)
    fresh = build_optimizer(config, other)
    for part, stored in zip(fresh, parts, strict=True):
        part.load_state_dict(stored.state_dict())
    assert before + run(other, fresh, 12) == whole
    assert same_state(other.state_dict(), one.state_dict())


def test_a_long_gradient_is_shortened_and_a_short_one_is_not() -> None:
    """The gradient of all weights together is at most as long as configured, and keeps its direction."""
    model = _model()

    def gradient() -> Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    _step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    long = gradient().clone()
    clip_gradients(_config(), model)
    assert torch.equal(gradient(), long)
    clip_gradients(_config(max_gradient_norm=2.0 * long.norm().item()), model)
    assert torch.equal(gradient(), long)
    clip_gradients(_config(max_gradient_norm=0.1), model)
    assert gradient().norm().item() == pytest.approx(0.1, rel=1e-4)
    assert nn.functional.cosine_similarity(gradient(), long, dim=0).item() == pytest.approx(1.0, abs=1e-5)


def test_the_average_is_the_weights_until_its_warmup_is_over() -> None:
    """With a quarter of 8 steps, the first two updates copy; then little of the old average is kept."""
    model = _model()
    average = build_average(_config(steps=8, ema_warmup=0.25, ema_decay=0.995), model)
    weight = model.get_parameter("4.weight")
    expected = torch.zeros_like(weight)
    for update in range(5):
        with torch.no_grad():
            weight.add_(1.0)
        average.update_parameters(model)
        t = update - 2
        kept = min(0.995, (1 + t) / (10 + t)) if t >= 0 else 0.0
        expected = kept * expected + (1 - kept) * weight.detach()
        assert torch.allclose(average.get_parameter("module.4.weight"), expected, atol=1e-5)


def test_without_decay_the_average_is_the_weights() -> None:
    """At 0 the released weights are the last ones, bit for bit."""
    model = _model()
    average = build_average(_config(ema_decay=0.0), model)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        average.update_parameters(model)
    assert same_state(average.module.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"kind": "sgd", "momentum": 0.0}}, "set nesterov to false"),
        ({"optimizer": {"kind": "adamw", "momentum": 0.9}}, "Extra inputs are not permitted"),
        (
            {"optimizer": {"kind": "sgd", "momentum": 0.8}, "schedule": {"kind": "one-cycle"}},
            r"optimizer\.momentum 0\.8 has no effect where the schedule cycles the momentum",
        ),
        ({"schedule": {"kind": "piecewise", "milestones": (0.7, 0.5)}}, "expected milestones in ascending order"),
        ({"schedule": {"kind": "piecewise", "milestones": (1.0,)}}, "less than 1"),
        ({"schedule": {"kind": "cosine", "milestones": (0.5,)}}, "Extra inputs are not permitted"),
        ({"schedule": {"kind": "one-cycle", "warmup_share": 0.0}}, "greater than 0"),
        ({"max_gradient_norm": 0.0}, "greater than 0"),
        ({"ema_warmup": 1.0}, "less than 1"),
        ({"objective": {"kind": "natural", "sigma": 0.25}}, "Extra inputs are not permitted"),
        ({"objective": {"kind": "pgd", "relative_step": 0.0}}, "greater than 0"),
        ({"objective": {"kind": "mart", "label_smoothing": 0.1}}, "Extra inputs are not permitted"),
        ({"objective": {"kind": "gaussian", "sigma": 0.25}}, "does not match any of the expected tags"),
        ({"objective": {"kind": "natural", "attack_batchnorm": "train"}}, "Extra inputs are not permitted"),
        ({"objective": {"kind": "trades", "awp": {"gamma": 0.0}}}, "greater than 0"),
        ({"objective": {"kind": "trades", "awp": {"warmup": 1.0}}}, "less than 1"),
    ],
)
def test_a_setting_that_is_wrong_or_without_effect_is_refused(values: dict[str, Any], message: str) -> None:
    """Before the first batch, by the configuration."""
    with pytest.raises(ValidationError, match=message):
        _config(**values)
