"""Checkpoints of a stage that is under way: whole or not at all, named by their step, checked by hash when read."""

import io
import pickle
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from pydantic import ValidationError

from proxyrob.errors import CheckpointMismatch, DataIntegrityError
from proxyrob.storage.files import sha256_of, verify_file, write_bytes, write_json
from proxyrob.storage.stage import Report, Stage

POINTER = "checkpoint.json"


class Stateful(Protocol):
    """A model, optimizer, schedule or average."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class CheckpointPointer(Report):
    """Says which file is the newest checkpoint. It is replaced after that file is whole."""

    digest: str
    step: int
    file: str
    sha256: str
    history: tuple[dict[str, float], ...]


def save_checkpoint(stage: Stage, step: int, parts: Mapping[str, Stateful], history: tuple[dict[str, float], ...] = ()) -> None:
    """Write the state of ``parts`` after ``step`` steps; the checkpoint before it is removed afterwards."""
    path = stage.scratch / f"checkpoint-{step:08d}.pt"
    content = io.BytesIO()  # torch's own file writer hides a full disk behind an error of its own
    torch.save({name: part.state_dict() for name, part in parts.items()}, content)
    write_bytes(path, content.getvalue())
    pointer = CheckpointPointer(digest=stage.digest, step=step, file=path.name, sha256=sha256_of(path), history=history)
    write_json(stage.scratch / POINTER, pointer.model_dump(mode="json"))
    for old in stage.scratch.glob("checkpoint-*.pt"):
        if old != path:
            old.unlink()


def load_checkpoint(
    stage: Stage, parts: Mapping[str, Stateful], device: torch.device | str
) -> tuple[int, tuple[dict[str, float], ...]]:
    """Restore ``parts`` from the newest checkpoint; the number of steps done and the history so far, or ``(0, ())``.

    Nothing is unpickled but tensors and plain values. Raises ``DataIntegrityError`` when the checkpoint is damaged,
    naming the file and its expected hash, and ``CheckpointMismatch`` when it belongs to another configuration.
    """
    pointer_path = stage.scratch / POINTER
    if not pointer_path.is_file():
        return 0, ()
    remedy = f"delete the folder {stage.scratch} and run again: this stage then starts from its first step"
    try:
        pointer = CheckpointPointer.model_validate_json(pointer_path.read_bytes())
    except ValidationError as error:
        raise DataIntegrityError(f"{pointer_path} cannot be read; {remedy}") from error
    if pointer.digest != stage.digest:
        raise CheckpointMismatch(
            f"{pointer_path} was written by another configuration (digest {pointer.digest[:12]}, "
            f"expected {stage.digest[:12]}); {remedy}"
        )
    path = stage.scratch / pointer.file
    verify_file(path, pointer.sha256, remedy)
    try:
        states = torch.load(path, map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(states[name])
    except (KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointMismatch(f"{path} does not hold the state of this configuration: {error}; {remedy}") from error
    return pointer.step, pointer.history
