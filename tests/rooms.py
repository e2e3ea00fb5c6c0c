"""Functions for processes that have little memory. It imports little, because every one of them does."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def call_in_room(function: Callable[..., Any], room: int, arguments: dict[str, Any], on_progress: Callable[..., Any]) -> Any:
    """Call a function in this process, which may from now on ask the kernel for ``room`` bytes of addresses more."""
    warm = nn.Conv2d(1, 4, 3)(torch.zeros(64, 1, 8, 8, requires_grad=True))  # libraries are loaded and threads started before
    warm.sum().backward()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    return function(**arguments, on_progress=on_progress)
