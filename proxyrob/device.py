"""Where tensors live, and in which mode a model is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

BatchNormMode = Literal["eval", "train"]
"""What batch normalisation divides by inside an attack: its running statistics, or those of the batch."""


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


def require_devices(name: str, num_processes: int) -> None:
    """Let each of several processes have a device of its own, where ``name`` is that of a GPU.

    Raises ``ValueError`` when there are not as many.
    """
    device = torch.device(name)
    if device.type != "cuda" or num_processes == 1:
        return
    there = torch.cuda.device_count()
    if device.index is not None or num_processes > there:
        raise ValueError(
            f"{num_processes} processes need a GPU each, got device {name!r} on a machine with {there}; use 'cuda' and at most "
            "as many processes as there are GPUs, or 'cpu'"
        )


def has_batchnorm(model: nn.Module) -> bool:
    """Whether what a model makes of an image can depend on the batch it is in."""
    return any(isinstance(layer, _BatchNorm) for layer in model.modules())


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
def untracked(model: nn.Module) -> Iterator[None]:
    """Let no running statistic of batch normalisation move; layers in train mode still divide by those of the batch."""
    layers = [(layer, layer.track_running_stats) for layer in model.modules() if isinstance(layer, _BatchNorm)]
    for layer, _ in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, tracked in layers:
            layer.track_running_stats = tracked


@contextmanager
def attack_mode(model: nn.Module, batchnorm: BatchNormMode = "eval") -> Iterator[None]:
    """Eval mode, in which batch normalisation stays as the caller set it where ``batchnorm`` is ``train``.

    No running statistic moves either way, and every module gets its own flags back.
    """
    training = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.training]
    with eval_mode(model), untracked(model):
        if batchnorm == "train":
            for layer in training:
                layer.training = True
        yield


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
