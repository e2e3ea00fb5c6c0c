"""Which attacks AutoAttack (Croce and Hein 2020) is made of, for how many classes, and what each of them costs."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from proxyrob.attacks import (
    Attacked,
    Confirm,
    attack_apgd,
    attack_apgd_targeted,
    attack_fab,
    attack_square,
    targeted_dlr,
    targeted_margin,
)
from proxyrob.threat import Threat

STANDARD_ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""In the order in which they are run, each on what the ones before it did not break; with few classes, too."""

SETTINGS_OF = "pyautoattack 0.2.0"
STANDARD, FEW_CLASSES, GATE = "AutoAttack standard", "few-class AutoAttack", "gate search"
BLACK_BOX = "black-box search (Square)"
Mode = Literal["standard", "gate", "black-box"]
MOST_TARGETS = 9
FEWEST_FOR_DLR = 4


@dataclass(frozen=True)
class Ensemble:
    """The four attacks for a number of classes.

    In mode ``gate`` they read the model in bfloat16, which finds nearly the same in less time: it serves to accept or refuse
    a model, and is never called AutoAttack. In mode ``black-box`` only the one is left that needs no gradient, and that is
    not AutoAttack either.
    """

    num_classes: int
    mode: Mode = "standard"

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"expected a model with at least 2 classes, got {self.num_classes}")

    @property
    def name(self) -> str:
        """*Standard* aims at nine other classes; with fewer it is another ensemble, and is not called so."""
        if self.mode != "standard":
            return GATE if self.mode == "gate" else BLACK_BOX
        return STANDARD if self.num_classes > MOST_TARGETS else FEW_CLASSES

    @property
    def attacks(self) -> tuple[str, ...]:
        """In the order in which they are run."""
        return ("square",) if self.mode == "black-box" else STANDARD_ATTACKS

    @property
    def precision(self) -> torch.dtype:
        """In which the attacks read the model; whether an image is broken is asked in float32 in any case."""
        return torch.bfloat16 if self.mode == "gate" else torch.float32

    @property
    def num_targets(self) -> int:
        return min(MOST_TARGETS, self.num_classes - 1)

    @property
    def has_dlr(self) -> bool:
        """The targeted difference of logits ratio needs four logits; with fewer its numerator stands alone."""
        return self.num_classes >= FEWEST_FOR_DLR

    def describe(self, attack: str) -> str:
        """What ran, for the header of a verdict table."""
        if self.name == STANDARD:
            return f"proxyrob {STANDARD}, settings of {SETTINGS_OF}, verdicts equal in tests"
        if self.name == BLACK_BOX:
            return f"proxyrob {BLACK_BOX}, settings of {SETTINGS_OF}, without any gradient"
        aimed = f"{self.num_targets} target{'s' if self.num_targets > 1 else ''}"
        loss = f"on the {'DLR loss' if self.has_dlr else 'margin'} " if attack == "apgd-t" else ""
        classes = f"{loss}({self.num_classes} classes, {aimed})"
        if self.mode == "gate":
            return f"proxyrob {GATE} in bfloat16, confirmed in float32, {classes}"
        return f"proxyrob {FEW_CLASSES} {classes}, settings of {SETTINGS_OF} otherwise"

    def attack(
        self,
        attack: str,
        model: nn.Module,
        images: Float[Tensor, "b c h w"],
        labels: Int64[Tensor, " b"],
        threat: Threat,
        *,
        seed: int,
        confirm: Confirm,
    ) -> Attacked:
        """Run one of the four on a batch; ``seed`` decides all that is random."""
        generator = torch.Generator().manual_seed(seed % 2**32)
        match attack:
            case "apgd-ce":
                return attack_apgd(model, images, labels, threat, generator=generator, confirm=confirm)
            case "apgd-t":
                loss = targeted_dlr if self.has_dlr else targeted_margin
                return attack_apgd_targeted(
                    model, images, labels, threat, num_targets=self.num_targets, generator=generator, loss=loss, confirm=confirm
                )
            case "fab-t":
                return attack_fab(model, images, labels, threat, num_targets=self.num_targets, confirm=confirm)
            case "square":
                return attack_square(model, images, labels, threat, generator=generator, confirm=confirm)
        raise ValueError(f"expected an attack out of {', '.join(STANDARD_ATTACKS)}, got {attack!r}")

    def readings(self, attack: str) -> int:
        """How often an attack shows an image that withstands it to the model."""
        targets = self.num_targets
        return {"apgd-ce": 101, "apgd-t": 1 + 101 * targets, "fab-t": 1 + 200 * targets, "square": 5001}[attack]

    def cost(self, attack: str) -> int:
        """What that takes, in forward passes; a gradient with respect to the image takes about as long as one."""
        targets = self.num_targets
        return {"apgd-ce": 201, "apgd-t": 1 + 201 * targets, "fab-t": 1 + 300 * targets, "square": 5001}[attack]
