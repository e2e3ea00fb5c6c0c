"""How weights are updated: the optimizer, and the course of its learning rate."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from proxyrob.config.base import Config, OpenShare

Decayed = Literal["all", "no-normalisation", "weights"]
"""Every parameter; all but those of normalisation layers; or only tensors that multiply: neither those nor biases."""

DecayedField = Annotated[
    Decayed,
    Field(
        description="parameters that the weight decay shrinks: all, no-normalisation (all but those of normalisation layers) "
        "or weights (neither those nor biases)"
    ),
]
SMALLEST_FACTOR = 1e-12


class SgdOptimizer(Config):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    nesterov: bool = True
    decayed: DecayedField = "weights"

    @model_validator(mode="after")
    def _has_momentum(self) -> "SgdOptimizer":
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov looks ahead along the momentum, and momentum is 0; set nesterov to false")
        return self


class AdamWOptimizer(Config):
    """Adam with weight decay apart from the gradient (Loshchilov & Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"
    decayed: DecayedField = "all"


class CosineSchedule(Config):
    """Linear growth, then half a cosine (Loshchilov & Hutter 2017)."""

    kind: Literal["cosine"] = "cosine"
    warmup_share: Annotated[float, Field(ge=0.0, lt=1.0, description="share of the steps in which the rate grows")] = 1 / 30
    final_factor: Annotated[float, Field(ge=0.0, le=1.0, description="rate at the end, as a share of learning_rate")] = 0.0


class OneCycleSchedule(Config):
    """Half a cosine up and another down (Smith & Topin 2018), as torch's ``OneCycleLR``, whose defaults the factors are."""

    kind: Literal["one-cycle"] = "one-cycle"
    warmup_share: Annotated[OpenShare, Field(description="share of the steps in which the rate grows")] = 0.025
    initial_factor: Annotated[
        float, Field(ge=SMALLEST_FACTOR, le=1.0, description="rate at the beginning, as a share of learning_rate")
    ] = 0.04
    final_factor: Annotated[
        float, Field(ge=SMALLEST_FACTOR, le=1.0, description="rate at the end, as a share of learning_rate")
    ] = 4e-6
    cycles_momentum: Annotated[
        bool,
        Field(
            description="the momentum (AdamW's first beta) falls from 0.95 to 0.85 as the rate grows and rises again, in place "
            "of the optimizer's own"
        ),
    ] = True


class PiecewiseSchedule(Config):
    """A constant rate that drops at milestones."""

    kind: Literal["piecewise"] = "piecewise"
    milestones: Annotated[tuple[OpenShare, ...], Field(min_length=1, description="shares of the steps")] = (0.5, 0.75)
    factor: Annotated[OpenShare, Field(description="what a milestone multiplies the rate by")] = 0.1

    @model_validator(mode="after")
    def _ascending(self) -> "PiecewiseSchedule":
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"expected milestones in ascending order, each once, got {self.milestones}")
        return self


OptimizerConfig = Annotated[SgdOptimizer | AdamWOptimizer, Field(discriminator="kind")]
ScheduleConfig = Annotated[CosineSchedule | OneCycleSchedule | PiecewiseSchedule, Field(discriminator="kind")]
