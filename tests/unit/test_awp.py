"""Adversarial weight perturbation: there and back."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from proxyrob.config import AwpConfig
from proxyrob.train import awp_gamma, perturbed_weights
from tests.toys import random_images, same_state

LABELS = torch.arange(6)


@pytest.fixture
def model() -> nn.Sequential:
    """A network with batch normalisation, in train mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).train()


def _loss(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(random_images(6)), LABELS)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_weights_come_back_bit_for_bit(model: nn.Sequential) -> None:
    """After the block every bit of every parameter and statistic is what it was, and no gradient is left over."""
    before = _state(model)
    with perturbed_weights(model, 0.3, lambda: [_loss(model)]):
        assert not same_state(_state(model), before)
    assert same_state(_state(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_weights_come_back_after_an_error(model: nn.Sequential) -> None:
    """Also when the block fails."""
    before = _state(model)
    with pytest.raises(ArithmeticError), perturbed_weights(model, 0.3, lambda: [_loss(model)]):
        raise ArithmeticError
    assert same_state(_state(model), before)


def test_weights_that_multiply_move_and_nothing_else(model: nn.Sequential) -> None:
    """Each moves by gamma of its own length, to where the loss is larger; biases and normalisation layers stay."""
    before, small = _state(model), _loss(model).item()
    model.load_state_dict(before)
    with perturbed_weights(model, 0.05, lambda: [_loss(model)]):
        moved = {name: value - before[name] for name, value in _state(model).items()}
        assert _loss(model).item() > small
    for name in ("0.weight", "4.weight"):
        assert moved[name].norm().item() == pytest.approx(0.05 * before[name].norm().item(), rel=1e-4)
    assert {name for name, move in moved.items() if bool((move != 0).any())} == {"0.weight", "4.weight"}


def test_without_gamma_nothing_is_computed(model: nn.Sequential) -> None:
    """Where weights are not perturbed, or not yet, the loss is not even asked for."""

    def never() -> list[Tensor]:
        raise AssertionError

    before = _state(model)
    with perturbed_weights(model, 0.0, never):
        assert same_state(_state(model), before)


def test_it_begins_after_its_warmup() -> None:
    """Gamma from the first step after that share of all steps; 0 before, and always without a configuration."""
    assert [awp_gamma(AwpConfig(gamma=0.01, warmup=0.25), step, 8) for step in range(4)] == [0.0, 0.0, 0.01, 0.01]
    assert awp_gamma(AwpConfig(gamma=0.01), 0, 8) == 0.01
    assert awp_gamma(None, 7, 8) == 0.0


def test_a_weight_without_gradient_stays(model: nn.Sequential) -> None:
    """A layer that the loss does not use, or whose gradient is 0, is not moved to nowhere."""
    part = nn.Sequential(*list(model))
    model.add_module("unused", nn.Linear(3, 3))
    before = _state(model)
    with perturbed_weights(model, 0.1, lambda: [_loss(part)]):
        assert torch.equal(model.state_dict()["unused.weight"], before["unused.weight"])
        assert not torch.equal(model.state_dict()["4.weight"], before["4.weight"])
    with perturbed_weights(model, 0.1, lambda: [0.0 * _loss(part)]):
        assert same_state(_state(model), before)


def test_processes_that_share_a_batch_move_alike(model: nn.Sequential) -> None:
    """What averages the gradients over processes is given them before they are used."""
    before = _state(model)

    def turn(gradients: Sequence[Tensor]) -> None:
        for gradient in gradients:
            gradient.neg_()

    with perturbed_weights(model, 0.05, lambda: [_loss(model)]):
        up = _state(model)["0.weight"] - before["0.weight"]
    with perturbed_weights(model, 0.05, lambda: [_loss(model)], turn):
        down = _state(model)["0.weight"] - before["0.weight"]
    assert torch.allclose(up, -down, atol=1e-6)
    assert bool((up != 0).any())
