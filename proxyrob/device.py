"""Where tensors live, and in which mode a model is read."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def resolve_device(name: str) -> torch.device:
    """``auto`` (a CUDA device where there is one), ``cpu``, ``cuda`` or ``cuda:1``.

    Raises ``ValueError`` when the named device is not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"expected a device such as 'auto', 'cpu' or 'cuda:0', got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not on this machine ({torch.cuda.device_count()} CUDA devices); use 'auto' or 'cpu'"
        )
    return device


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into eval mode and give every module its own flag back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn off weight gradients: an attack wants the gradient with respect to images alone."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
