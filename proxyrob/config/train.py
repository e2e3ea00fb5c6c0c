"""Training a classifier."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from proxyrob.config.base import Config, NonNegative, Positive, Share
from proxyrob.config.objective import (
    GaussianObjective,
    MartObjective,
    NaturalObjective,
    PgdObjective,
    SmoothAdvObjective,
    StabilityObjective,
    TradesObjective,
)
from proxyrob.config.optimizer import (
    AdamWOptimizer,
    CosineSchedule,
    OneCycleSchedule,
    OptimizerConfig,
    ScheduleConfig,
    SgdOptimizer,
)
from proxyrob.config.subset import SubsetConfig

RobustObjective = Annotated[NaturalObjective | PgdObjective | TradesObjective | MartObjective, Field(discriminator="kind")]
SmoothObjective = Annotated[StabilityObjective | GaussianObjective | SmoothAdvObjective, Field(discriminator="kind")]


class ComputeConfig(Config):
    """How a step is computed. But for rounding, ``precision`` alone changes what is computed."""

    path: Annotated[
        Literal["fast", "plain"],
        Field(
            description="fast: attacks read a copy of the network whose batch normalisation is part of its convolutions (where "
            "attack_batchnorm is eval), in the layout that convolutions are fastest in; plain: the network itself"
        ),
    ] = "fast"
    precision: Annotated[
        Literal["float32", "bfloat16"],
        Field(description="of the layers, in attacks and in the update; weights, losses and averages stay float32"),
    ] = "float32"

    @model_validator(mode="after")
    def _plain_is_plain(self) -> "ComputeConfig":
        if self.path == "plain" and self.precision != "float32":
            raise ValueError(f"the plain path computes in float32; leave out path, or precision {self.precision}")
        return self


class TrainConfig(Config):
    """Training on real and synthetic images together; the objective is set by the subclasses."""

    MEANS: ClassVar[frozenset[str]] = frozenset({"micro_batch"})

    steps: Annotated[int, Field(gt=0, description="optimizer steps, the same for real-only and mixed")] = 600
    batch_size: Annotated[int, Field(gt=1, description="images per step, real and synthetic together")] = 128
    synthetic_fraction: Annotated[float, Field(ge=0.0, lt=1.0, description="share of synthetic images in a batch")] = 0.5
    gamma: Annotated[Share, Field(description="weight of the loss on real images; 1 - gamma is that of synthetic ones")] = 0.5
    micro_batch: Annotated[
        int | None,
        Field(
            gt=0,
            description="images held in memory at once; gradients are added up, and with batch normalisation, whose statistics "
            "are those of the whole batch either way, the inside of each block is computed twice. Without it, the batch",
        ),
    ] = None
    compute: ComputeConfig = ComputeConfig()
    learning_rate: Positive = 1e-2
    weight_decay: NonNegative = 5e-4
    optimizer: OptimizerConfig = AdamWOptimizer()
    schedule: ScheduleConfig = CosineSchedule()
    max_gradient_norm: Annotated[
        Positive | None, Field(description="a longer gradient, of all weights together, is shortened to this")
    ] = None
    warmup: Annotated[Share, Field(description="share of the steps in which the perturbation grows to its full size")] = 0.2
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0, description="of the average of the weights; 0: the last weights")] = 0.99
    ema_warmup: Annotated[
        float, Field(ge=0.0, lt=1.0, description="share of the steps in which the average is the weights themselves")
    ] = 0.0
    sync_batchnorm: Annotated[
        bool,
        Field(
            description="batch normalisation divides by the statistics of the images of all processes of a training; without "
            "it each process takes those of its own images, and the running statistics of the first are used and released. "
            "One process alone has all images either way"
        ),
    ] = False
    shift: Annotated[int, Field(ge=0, description="random translation of the images, in pixels")] = 0
    flip: Annotated[bool, Field(description="mirror half of the images left to right")] = False
    cutmix: Annotated[Share, Field(description="share of batches whose images exchange boxes (Yun et al. 2019)")] = 0.0
    subset: Annotated[SubsetConfig, Field(description="which of the labelled synthetic images are trained on")] = SubsetConfig()
    checkpoint_every: Annotated[int, Field(gt=0, description="steps between checkpoints")] = 100
    validate_every: Annotated[
        int | None, Field(gt=0, description="steps between measurements on validation and training images; without it none")
    ] = None
    selection: Annotated[
        Literal["last", "validation"],
        Field(description="released weights: the last, or those with the best PGD accuracy on validation images"),
    ] = "last"

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
        elif not self.subset.is_all:
            raise ValueError("subset chooses synthetic images and has no effect with synthetic_fraction 0; leave it out")
        return self

    @model_validator(mode="after")
    def _one_momentum(self) -> "TrainConfig":
        match self.optimizer, self.schedule:
            case SgdOptimizer(momentum=momentum), OneCycleSchedule(cycles_momentum=True) if momentum != SgdOptimizer().momentum:
                raise ValueError(
                    f"optimizer.momentum {momentum:g} has no effect where the schedule cycles the momentum; leave it out or "
                    "set schedule.cycles_momentum to false"
                )
        return self

    @model_validator(mode="after")
    def _measured(self) -> "TrainConfig":
        if self.selection == "validation" and self.validate_every is None:
            raise ValueError("selection 'validation' needs measurements to choose from; set validate_every")
        return self

    def real_only(self) -> "TrainConfig":
        """The same training without synthetic images: the same steps and the same batch size."""
        return self.replace(synthetic_fraction=0.0, gamma=1.0, subset=SubsetConfig())


class RobustTrainConfig(TrainConfig):
    """Training of the classifier that is evaluated and released."""

    objective: RobustObjective = PgdObjective()


class SmoothTrainConfig(TrainConfig):
    """Training of the base classifier of randomized smoothing."""

    objective: SmoothObjective = StabilityObjective()
