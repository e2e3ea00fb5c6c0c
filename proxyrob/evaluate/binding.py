"""What verdicts depend on, as hashes: work that was begun under other conditions is not gone on with."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from proxyrob import attacks
from proxyrob.models import hash_inputs
from proxyrob.threat import Threat


def describe_inputs(
    model: nn.Module, images: Float[Tensor, "n c h w"], labels: Int64[Tensor, " n"], threat: Threat, seed: int
) -> dict[str, Any]:
    """Model, images, labels, threat model, seed, and the program of the attacks."""
    return {
        **hash_inputs(model, images, labels),
        "norm": threat.norm,
        "epsilon": str(threat.epsilon),
        "seed": seed,
        "attacks": _hash_attacks(),
    }


@cache
def _hash_attacks() -> str:
    """The hash of the source files of ``proxyrob.attacks``."""
    content = hashlib.sha256()
    for path in sorted(Path(attacks.__path__[0]).glob("*.py")):
        content.update(path.read_bytes())
    return content.hexdigest()
