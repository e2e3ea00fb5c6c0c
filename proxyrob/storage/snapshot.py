"""The state of models and optimizers at one moment, and its file."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from proxyrob.errors import CheckpointMismatch
from proxyrob.storage.placed import Placing
from proxyrob.storage.tensors import UNFIT, read_tensors

PLAIN = frozenset({type(None), bool, int, float, str, bytes})


class Stateful(Protocol):
    """A model, optimizer, schedule or average."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Snapshot:
    """The states of parts by their names, and the history so far, in memory of its own on the CPU."""

    parts: dict[str, Any]
    history: list[dict[str, float]]


def take_snapshot(parts: Mapping[str, Stateful], history: Sequence[dict[str, float]]) -> Snapshot:
    """Copy the states of ``parts``, so that no later change reaches them.

    Raises ``TypeError`` for what ``restore_snapshot`` would refuse: anything but tensors, plain values, and lists, tuples and
    dicts of them.
    """
    states = {name: _copied(part.state_dict(), name) for name, part in parts.items()}
    return Snapshot(states, _copied(list(history), "history"))


def write_snapshot(snapshot: Snapshot, placing: Placing) -> None:
    """Write a snapshot into a file under way, tensor by tensor: there is no second copy of it in memory."""
    sink = _Sink(placing)
    try:
        torch.save(vars(snapshot), cast("IO[bytes]", sink))
    except RuntimeError as error:
        if sink.failure is not None:
            raise sink.failure from error
        raise


def restore_snapshot(
    path: Path, parts: Mapping[str, Stateful], device: torch.device | str, *, remedy: str
) -> tuple[dict[str, float], ...]:
    """Give ``parts`` the states in a file, and return its history. Nothing is unpickled but tensors and plain values.

    Raises ``CheckpointMismatch``, ending with ``remedy``, when the file holds anything else or does not fit.
    """
    try:
        states = read_tensors(path, device)
        for name, part in parts.items():
            part.load_state_dict(states["parts"][name])
        return tuple(states["history"])
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # the device's own trouble, which torch derives from RuntimeError
    except UNFIT as error:
        raise CheckpointMismatch(f"{path} does not hold the state of this configuration: {error}; {remedy}") from error


def _copied(value: Any, owner: str) -> Any:
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is Tensor or kind is Parameter:
        return value.detach().to("cpu", copy=True)
    if kind is dict or kind is OrderedDict:
        copied = copy(value)  # with the versions that a module keeps beside the items of its state
        for name, part in value.items():
            copied[name] = _copied(part, owner)
        return copied
    if kind is list or kind is tuple:
        return kind(_copied(part, owner) for part in value)
    raise TypeError(
        f"expected tensors and plain values in the state of {owner}, got {kind.__module__}.{kind.__qualname__}; "
        "convert it in its state_dict"
    )


class _Sink:
    """What ``torch.save`` writes into. torch's writer hides a full disk behind an error of its own; this keeps the cause."""

    def __init__(self, placing: Placing) -> None:
        self._placing = placing
        self.failure: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        try:
            self._placing.write(content)
        except OSError as error:
            self.failure = error
            raise
        return len(content)

    def flush(self) -> None:
        """The file is flushed when it gets its name."""
