"""Measuring robustness."""

import difflib
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from proxyrob.config.base import Config, Count, OpenShare, Share

CheckName = Literal[
    "inputs",
    "class-count",
    "logits",
    "deterministic",
    "batch-of-one",
    "batch-order",
    "batch-padding",
    "running-statistics",
    "gradients",
    "saturation",
    "epsilon-curve",
    "more-steps",
    "transfer",
    "ensemble",
    "black-box",
    "near-duplicates",
    "selection",
]
"""The sanity checks, in the order in which they are made (``proxyrob.evaluate.sanity``). A failed one is waived by its name."""

LONGEST_REASON = 300
"""A reason is shown wherever the verdict is, and MLflow keeps at most 5,000 characters of a version's description."""


class EvaluateConfig(Config):
    """Clean accuracy, PGD-20 and AutoAttack on the whole test split."""

    mode: Annotated[
        Literal["standard", "gate"],
        Field(description="`standard` is AutoAttack; `gate` a faster search in bfloat16, whose figures are no AutoAttack's"),
    ] = "standard"
    target: Annotated[
        Share | None,
        Field(description="robust accuracy at which mode `gate` stops: as soon as it is reached for sure, or out of reach"),
    ] = None
    pgd_steps: Count = 20
    pgd_relative_step: Annotated[float, Field(gt=0.0, le=2.0, description="attack step size as a share of epsilon")] = 0.125
    batch_size: Annotated[int, Field(gt=0, description="images attacked at once")] = 266

    @model_validator(mode="after")
    def _target_has_effect(self) -> Self:
        if self.mode == "standard" and self.target is not None:
            raise ValueError(
                f"target is {self.target}, but mode standard attacks every image to the end; expected mode gate, or no target"
            )
        return self


class BlackBoxConfig(Config):
    """Attacks on a model that gives logits and no gradients: Square alone."""

    batch_size: Annotated[int, Field(gt=0, description="images attacked at once")] = 266


class GateConfig(Config):
    """When a challenger may become champion."""

    margin: Annotated[Share, Field(description="AutoAttack accuracy that may be lost, as a share of the images")] = 0.02
    confidence: OpenShare = 0.95
    waivers: Annotated[
        dict[str, str], Field(description="sanity checks that may fail, by name, each with the reason why that is acceptable")
    ] = Field(default_factory=dict)

    @field_validator("waivers")
    @classmethod
    def _known_and_reasoned(cls, waivers: dict[str, str]) -> dict[str, str]:
        known = get_args(CheckName)
        for name, reason in waivers.items():
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(f"there is no sanity check {name!r}{hint}; checks: {', '.join(known)}")
            if not 0 < len(reason.strip()) <= LONGEST_REASON:
                raise ValueError(
                    f"expected the reason why a failed check {name!r} is acceptable, in 1 to {LONGEST_REASON} characters, "
                    f"got {len(reason.strip())}"
                )
        return {name: " ".join(waivers[name].split()) for name in known if name in waivers}
