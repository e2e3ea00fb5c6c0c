"""Training a classifier."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from proxyrob.config.base import Config, Count, NonNegative, OpenShare, Positive, Share


class NaturalObjective(Config):
    """Cross-entropy on unperturbed images."""

    kind: Literal["natural"] = "natural"


class PgdObjective(Config):
    """Cross-entropy on images perturbed by projected gradient descent (Madry et al. 2018)."""

    kind: Literal["pgd"] = "pgd"
    attack_steps: Count = 10
    relative_step: Annotated[float, Field(gt=0.0, le=2.0, description="attack step size as a share of epsilon")] = 0.25


class TradesObjective(Config):
    """Cross-entropy plus beta times the divergence to perturbed images (Zhang et al. 2019)."""

    kind: Literal["trades"] = "trades"
    beta: Positive = 6.0
    attack_steps: Count = 10
    relative_step: Annotated[float, Field(gt=0.0, le=2.0, description="attack step size as a share of epsilon")] = 0.25


class StabilityObjective(Config):
    """Cross-entropy plus beta times the divergence under Gaussian noise, for smoothing (Li et al. 2019)."""

    kind: Literal["stability"] = "stability"
    beta: Positive = 6.0
    sigma: Annotated[float, Field(gt=0.0, le=2.0, description="noise in pixel units of [0,1]")] = 0.25


RobustObjective = Annotated[NaturalObjective | PgdObjective | TradesObjective, Field(discriminator="kind")]


class TrainConfig(Config):
    """Training on real and synthetic images together; the objective is set by the subclasses."""

    steps: Annotated[int, Field(gt=0, description="optimizer steps, the same for real-only and mixed")] = 600
    batch_size: Annotated[int, Field(gt=1, description="images per step, real and synthetic together")] = 128
    synthetic_fraction: Annotated[float, Field(ge=0.0, lt=1.0, description="share of synthetic images in a batch")] = 0.5
    gamma: Annotated[Share, Field(description="weight of the loss on real images; 1 - gamma is that of synthetic ones")] = 0.5
    learning_rate: Positive = 1e-2
    weight_decay: NonNegative = 5e-4
    warmup: Annotated[Share, Field(description="share of the steps in which the perturbation grows to its full size")] = 0.2
    ema_decay: OpenShare = 0.99
    shift: Annotated[int, Field(ge=0, description="random translation of the images, in pixels")] = 0
    checkpoint_every: Annotated[int, Field(gt=0, description="steps between checkpoints")] = 100

    @property
    def num_synthetic(self) -> int:
        """Synthetic images in a batch."""
        return round(self.batch_size * self.synthetic_fraction)

    @model_validator(mode="after")
    def _both_parts(self) -> "TrainConfig":
        if self.synthetic_fraction > 0:
            if not 0 < self.num_synthetic < self.batch_size:
                raise ValueError(
                    f"a batch of {self.batch_size} with synthetic_fraction {self.synthetic_fraction} has "
                    f"{self.num_synthetic} synthetic images; choose them so that both parts have at least one"
                )
            if self.gamma in (0.0, 1.0):
                part = "synthetic" if self.gamma == 1.0 else "real"
                raise ValueError(
                    f"gamma {self.gamma:g} gives the {part} part of each batch no weight; choose a gamma between 0 and 1, "
                    "or set synthetic_fraction to 0 to train on real images alone"
                )
        elif self.gamma != 1.0:
            raise ValueError(f"gamma {self.gamma:g} has no effect with synthetic_fraction 0; set gamma to 1")
        return self

    def real_only(self) -> "TrainConfig":
        """The same training without synthetic images: the same steps and the same batch size."""
        return self.replace(synthetic_fraction=0.0, gamma=1.0)


class RobustTrainConfig(TrainConfig):
    """Training of the classifier that is evaluated and released."""

    objective: RobustObjective = PgdObjective()


class SmoothTrainConfig(TrainConfig):
    """Training of the base classifier of randomized smoothing."""

    objective: StabilityObjective = StabilityObjective()
