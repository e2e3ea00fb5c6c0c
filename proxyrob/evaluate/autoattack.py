"""AutoAttack *standard* through pyautoattack: its own four attacks, settings and batches, in pieces that survive a kill."""

import io
from contextlib import redirect_stdout
from importlib.metadata import version
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from pyautoattack import AutoAttack
from torch import Tensor, nn

from proxyrob.device import eval_mode
from proxyrob.errors import DataIntegrityError
from proxyrob.rng import isolated_rng
from proxyrob.storage import Stage
from proxyrob.storage.files import run_units
from proxyrob.threat import Norm, Threat
from proxyrob.types import OnProgress, no_progress

STANDARD_ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
FEWEST_CLASSES = 10
"""Standard AutoAttack aims at nine targets; with fewer classes it would be another, weaker ensemble."""

NORMS: dict[Norm, Literal["Linf", "L2"]] = {"linf": "Linf", "l2": "L2"}
TOLERANCE = 1e-5


def autoattack_version() -> str:
    """Name and version of what ran, for the header of a verdict table."""
    return f"pyautoattack {version('pyautoattack')} standard"


def run_autoattack(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    labels: Int64[Tensor, " n"],
    threat: Threat,
    *,
    batch_size: int,
    seed: int,
    stage: Stage,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> dict[str, Bool[np.ndarray, " n"]]:
    """For each attack in order, which images it broke; images broken by an earlier attack are not attacked again.

    The verdicts equal one call of ``AutoAttack(version="standard").run_standard_evaluation`` with the same seed and
    batch size. Work is cut into (attack, batch) units, each written once and whole into the stage's scratch folder.
    Every adversarial image is checked: inside the threat model, inside [0,1], no NaN.

    Raises ``ValueError`` for fewer than ten classes and ``DataIntegrityError`` when an attack leaves its threat model.
    """
    with torch.inference_mode(), eval_mode(model):
        logits = torch.cat([model(batch.to(device)).cpu() for batch in images.split(batch_size)])
    if logits.shape[1] < FEWEST_CLASSES:
        raise ValueError(f"AutoAttack standard needs at least {FEWEST_CLASSES} classes (nine targets), got {logits.shape[1]}")
    standing = (logits.argmax(1) == labels).numpy()
    folder = stage.scratch / "autoattack"
    broken = {}
    for position, attack in enumerate(STANDARD_ATTACKS):
        rows = np.flatnonzero(standing)
        units = {
            f"{attack}-{k:04d}": rows[start : start + batch_size] for k, start in enumerate(range(0, len(rows), batch_size))
        }

        def attack_one(name: str, attack: str = attack, units: dict[str, Int64[np.ndarray, " m"]] = units) -> pd.DataFrame:
            chosen = torch.from_numpy(units[name])
            hits = _attack_batch(model, attack, images[chosen], labels[chosen], threat, batch_size, seed, device)
            return pd.DataFrame({"index": units[name], "broken": hits})

        def tell(done: int, position: int = position, count: int = len(units), share: float = float(standing.mean())) -> None:
            on_progress(100 * position + 100 * done // max(count, 1), 100 * len(STANDARD_ATTACKS), standing=share)

        broken[attack] = np.zeros(len(labels), dtype=bool)
        if units:
            table = run_units(folder, list(units), attack_one, tell)
            broken[attack][table["index"].to_numpy()] = table.broken.to_numpy()
        standing &= ~broken[attack]
    total = 100 * len(STANDARD_ATTACKS)
    on_progress(total, total, standing=float(standing.mean()))
    return broken


def _attack_batch(
    model: nn.Module,
    attack: str,
    images: Float[Tensor, "m c h w"],
    labels: Int64[Tensor, " m"],
    threat: Threat,
    batch_size: int,
    seed: int,
    device: str,
) -> Bool[np.ndarray, " m"]:
    with isolated_rng(seed), eval_mode(model):
        ensemble = AutoAttack(
            model, device=device, eps=float(threat.epsilon), norm=NORMS[threat.norm], seed=seed % 2**32, version="standard"
        )
        assert tuple(ensemble.attacks_to_run or ()) == STANDARD_ATTACKS
        ensemble.attacks_to_run = [attack]
        with redirect_stdout(io.StringIO()):  # it prints warnings once a batch; our own sanity checks find what they mean
            attacked, _ = ensemble.run_standard_evaluation(images, labels, batch_size=batch_size)
        _check_inside(attacked, images, threat, attack)
        with torch.inference_mode():
            return (model(attacked.to(device)).argmax(1).cpu() != labels).numpy()


def _check_inside(attacked: Float[Tensor, "m c h w"], images: Float[Tensor, "m c h w"], threat: Threat, attack: str) -> None:
    delta = (attacked - images).flatten(1)
    length = delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)
    if not bool(torch.isfinite(attacked).all()) or attacked.min() < 0 or attacked.max() > 1:
        raise DataIntegrityError(f"{attack} left [0,1] or produced NaN: the model's outputs or gradients are not finite")
    if float(length.max()) > float(threat.epsilon) + TOLERANCE:
        raise DataIntegrityError(f"{attack} left the threat model {threat}: a perturbation has norm {float(length.max()):.6f}")
