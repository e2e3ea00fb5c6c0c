"""What verdicts depend on, as hashes: work that was begun under other conditions is not gone on with."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from proxyrob import attacks
from proxyrob.threat import Threat


def describe_inputs(
    model: nn.Module, images: Float[Tensor, "n c h w"], labels: Int64[Tensor, " n"], threat: Threat, seed: int
) -> dict[str, Any]:
    """Model, images, labels, threat model, seed, and the program of the attacks."""
    return {
        "model": _hash_model(model),
        "images": _hash_tensor(images),
        "labels": _hash_tensor(labels),
        "norm": threat.norm,
        "epsilon": str(threat.epsilon),
        "seed": seed,
        "attacks": _hash_attacks(),
    }


def _hash_model(model: nn.Module) -> str:
    content = hashlib.sha256(repr(model).encode())
    for name, value in sorted(model.state_dict().items()):
        content.update(f"{name} {_hash_tensor(value)}".encode())
    return content.hexdigest()


def _hash_tensor(values: Tensor) -> str:
    content = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode())
    content.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


@cache
def _hash_attacks() -> str:
    """The hash of the source files of ``proxyrob.attacks``."""
    content = hashlib.sha256()
    for path in sorted(Path(attacks.__path__[0]).glob("*.py")):
        content.update(path.read_bytes())
    return content.hexdigest()
