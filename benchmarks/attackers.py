"""What ``benchmarks/evaluation.py`` measures of AutoAttack: pyautoattack's program and ours, on the same network and images.

A run of *standard* takes minutes of a core for each image that withstands it, so whole runs cannot take turns. What they are
made of can: a piece is one attack with few steps, run twice with different numbers of them, and the difference is the time
of a step without the beginning. ``whole_seconds`` puts a run together out of them.
"""

import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyautoattack
import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.examples.resnet import ResNet18
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from proxyrob.attacks import attack_apgd, attack_apgd_targeted, attack_fab, attack_square
from proxyrob.evaluate import STANDARD_ATTACKS, run_autoattack
from proxyrob.models import FoldedCopy
from proxyrob.rng import isolated_rng
from proxyrob.storage import DataPlace
from proxyrob.threat import Threat

PEER = "pyautoattack"
PRECISIONS = {"standard": torch.float32, "gate": torch.bfloat16}
SEED = 0
TARGETS, STEPS = 9, 100
FEW, MORE, MORE_OF_FAB = 2, 10, 32
"""Steps of the two runs of a piece. FAB's first steps are unlike later ones: it takes some to cross the boundary."""

SQUARE_QUERIES = {2: 201, 3: 300, 4: 500, 5: 1000, 6: 2000, 7: 999}
"""How many of Square's 5,000 queries halve the share of the pixels that the first squares cover, 0.8, so often. Those that
halve it less are counted with the first: all of them change most of the image."""

FIRST_SHARE = 0.8

Seconds = tuple[float, float]
"""Of the processor, and of the clock."""


def stopwatch(act: Any) -> tuple[Any, Seconds]:
    """What ``act()`` gives, and how long it takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = act()
    return found, (time.process_time() - cpu, time.perf_counter() - wall)


def peer_network() -> nn.Module:
    """The ResNet-18 that comes with pyautoattack, as its example loads it: not trained to be robust, weights not frozen."""
    network = ResNet18()
    path = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


class Contest:
    """One network, one threat model, and whoever attacks: ``pyautoattack``, ours in mode ``standard`` or ``gate``, or
    ``plain``, which is ours where it reads the network itself and not a folded copy."""

    def __init__(self, network: nn.Module, threat: Threat, example: Tensor) -> None:
        self.network, self.threat = network, threat
        self._read: dict[str, nn.Module] = {
            mode: FoldedCopy(network, precision, example=example) for mode, precision in PRECISIONS.items()
        } | {"plain": network}
        self._peer: dict[str, Any] = {"norm": "Linf", "eps": float(threat.epsilon), "seed": SEED, "device": "cpu"}

    def is_wrong(self, images: Tensor, labels: Tensor) -> Tensor:
        """Which images the network itself misclassifies, in float32."""
        with torch.inference_mode():
            return torch.cat([self.network(part) for part in images.split(64)]).argmax(1) != labels

    def whole_apgd(self, who: str, images: Tensor, labels: Tensor) -> Tensor:
        """All of APGD on the cross-entropy; which images it breaks."""
        if who == PEER:
            with isolated_rng(SEED):
                attack = APGDAttack(self.network, n_restarts=1, n_iter=STEPS, eot_iter=1, rho=0.75, **self._peer)
                return self.is_wrong(attack.perturb(images, labels), labels)
        generator = torch.Generator().manual_seed(SEED)
        given = {"generator": generator, "confirm": self.is_wrong}
        return attack_apgd(self._read[who], images, labels, self.threat, **given).broken

    def piece(self, who: str, attack: str, images: Tensor, labels: Tensor, halvings: int = 0) -> Seconds:
        """Seconds for one step of an attack and one image."""
        most = MORE_OF_FAB if attack == "fab-t" else MORE

        def few(steps: int) -> None:
            share = FIRST_SHARE / 2**halvings
            if who == PEER:
                with isolated_rng(SEED):
                    self._peer_attack(attack, steps, share).perturb(images, labels)
            else:
                with patch("proxyrob.attacks.square.FIRST_SHARE", share):
                    self._our_attack(who, attack, steps, images, labels)

        (_, less), (_, more) = (stopwatch(lambda steps=steps: few(steps)) for steps in (FEW, most))
        each = (most - FEW) * len(images)
        return (more[0] - less[0]) / each, (more[1] - less[1]) / each

    def _peer_attack(self, attack: str, steps: int, share: float) -> Any:
        match attack:
            case "apgd-t":
                return APGDAttack_targeted(self.network, n_iter=steps, n_target_classes=1, **self._peer)
            case "fab-t":
                return FABAttack_PT(self.network, n_iter=steps, n_restarts=1, targeted=True, n_target_classes=1, **self._peer)
        return SquareAttack(self.network, n_queries=steps, n_restarts=1, p_init=share, resc_schedule=False, **self._peer)

    def _our_attack(self, who: str, attack: str, steps: int, images: Tensor, labels: Tensor) -> None:
        model, generator = self._read[who], torch.Generator().manual_seed(SEED)
        given: dict[str, Any] = {"confirm": self.is_wrong}
        match attack:
            case "apgd-t":
                attack_apgd_targeted(
                    model, images, labels, self.threat, num_targets=1, steps=steps, generator=generator, **given
                )
            case "fab-t":
                attack_fab(model, images, labels, self.threat, num_targets=1, steps=steps, **given)
            case _:
                attack_square(model, images, labels, self.threat, queries=steps, generator=generator, **given)

    def whole_run(self, who: str, images: Tensor, labels: Tensor) -> dict[str, list[bool]]:
        """The whole ensemble on one batch of images, all classified correctly: what each attack breaks."""
        return self._peer_run(images, labels) if who == PEER else self._our_run(who, images, labels)

    def _our_run(self, who: str, images: Tensor, labels: Tensor) -> dict[str, list[bool]]:
        assert who in ("standard", "gate")
        with tempfile.TemporaryDirectory() as folder:
            run = run_autoattack(
                self.network,
                images,
                labels,
                self.threat,
                batch_size=len(images),
                seed=SEED,
                units=DataPlace.of(Path(folder)),
                mode="gate" if who == "gate" else "standard",
            )
            return {attack: hits.tolist() for attack, hits in run.broken.items()}

    def _peer_run(self, images: Tensor, labels: Tensor) -> dict[str, list[bool]]:
        standing, broken = torch.arange(len(images)), {}
        with isolated_rng(SEED), contextlib.redirect_stdout(io.StringIO()):
            peer = AutoAttack(self.network, version="standard", **self._peer)
            for attack in STANDARD_ATTACKS:
                hits = torch.zeros(len(images), dtype=torch.bool)
                if len(standing):
                    peer.attacks_to_run = [attack]
                    given = images[standing], labels[standing]
                    attacked, _ = peer.run_standard_evaluation(*given, batch_size=len(images))
                    hits[standing] = self.is_wrong(attacked, labels[standing])
                broken[attack] = hits.tolist()
                standing = standing[~hits[standing]]
        return broken


def whole_seconds(pieces: dict[str, float], first: float, withstood: float) -> float:
    """Seconds of a run of *standard*, from those of a step and image by the name of the piece: ``first`` for APGD on the
    cross-entropy of all images, and the three other attacks on those that withstand it."""
    square = sum(count * pieces[f"square-{halvings}"] for halvings, count in SQUARE_QUERIES.items())
    each = TARGETS * ((STEPS + 1) * pieces["apgd-t"] + STEPS * pieces["fab-t"]) + square
    return first + withstood * each
