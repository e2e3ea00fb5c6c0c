"""Where tensors live, and modes that are given back."""

from typing import Any

import pytest
import torch
from torch import nn

from proxyrob.device import attack_mode, eval_mode, frozen, resolve_device, untracked
from tests.toys import same_state


def _mixed_model() -> nn.Sequential:
    """A model in train mode whose second layer is in eval mode and whose first weight is frozen."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
    model[1].eval()
    model[0].weight.requires_grad_(False)  # pyright: ignore[reportCallIssue]  # a Parameter, though stubs say Tensor or Module
    return model


def _flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_auto_is_a_device_of_this_machine() -> None:
    """``auto`` is CUDA where there is one, else the CPU."""
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


def test_a_name_that_is_no_device_is_refused() -> None:
    """A typing mistake is answered with examples."""
    with pytest.raises(ValueError, match="expected a device such as 'auto', 'cpu' or 'cuda:0', got 'gpu'"):
        resolve_device("gpu")


def test_a_device_that_is_not_there_is_refused() -> None:
    """The hundredth GPU is refused before any work, with the number of those there are."""
    with pytest.raises(ValueError, match=rf"'cuda:99' is not on this machine \({torch.cuda.device_count()} CUDA devices\)"):
        resolve_device("cuda:99")


def test_eval_mode_gives_every_module_its_own_flag_back() -> None:
    """Inside everything is in eval mode; afterwards a part that was in eval mode is not put into train mode."""
    model = _mixed_model()
    before = _flags(model)
    assert len(set(before)) == 2
    with eval_mode(model):
        assert not any(_flags(model))
    assert _flags(model) == before


def test_eval_mode_gives_flags_back_after_an_error() -> None:
    """An attack that raises leaves the model as it was."""
    model = _mixed_model()
    before = _flags(model)
    with pytest.raises(RuntimeError, match="inside"), eval_mode(model):
        raise RuntimeError("inside")
    assert _flags(model) == before


def test_frozen_turns_off_weight_gradients_and_gives_each_flag_back() -> None:
    """Inside no weight asks for a gradient; afterwards a weight that was frozen before still is."""
    model = _mixed_model()
    before = [parameter.requires_grad for parameter in model.parameters()]
    assert len(set(before)) == 2
    with frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_frozen_gives_flags_back_after_an_error() -> None:
    """An attack that raises does not leave a model that no longer learns."""
    model = _mixed_model()
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="inside"), frozen(model):
        raise RuntimeError("inside")
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def _normalising_model() -> nn.Sequential:
    """A model in train mode of which one of two normalisation layers is in eval mode."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3)).train()
    model[2].eval()
    return model


def test_untracked_keeps_running_statistics_and_divides_by_those_of_the_batch() -> None:
    """The output is that of train mode, while no buffer moves; afterwards they move again."""
    model, batch = nn.BatchNorm1d(3).train(), torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with untracked(model):
        output = model(batch)
        assert same_state(model.state_dict(), before)
    assert torch.equal(output, model(batch))
    assert not same_state(model.state_dict(), before)


@pytest.mark.parametrize(("batchnorm", "inside"), [("eval", [False] * 4), ("train", [False, True, False, False])])
def test_an_attack_sees_the_mode_that_is_asked_for(batchnorm: Any, inside: list[bool]) -> None:
    """In train mode those normalisation layers alone that train; flags, tracking and statistics are as they were."""
    model = _normalising_model()
    before = _flags(model)
    with attack_mode(model, batchnorm):
        assert _flags(model) == inside
        model(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    assert _flags(model) == before
    assert all(layer.track_running_stats for layer in model if isinstance(layer, nn.BatchNorm1d))
    assert same_state(model.state_dict(), _normalising_model().state_dict())


def test_an_attack_that_fails_gives_everything_back() -> None:
    """Flags and tracking come back after an error."""
    model = _normalising_model()
    before = _flags(model)
    with pytest.raises(RuntimeError, match="inside"), attack_mode(model, "train"):
        raise RuntimeError("inside")
    assert _flags(model) == before
    assert all(layer.track_running_stats for layer in model if isinstance(layer, nn.BatchNorm1d))
