"""Network architectures."""

from typing import Annotated, Literal

from pydantic import Field

from proxyrob.config.base import Config, Count


class CnnModel(Config):
    """A small convolutional network without normalisation layers, for tiny images."""

    kind: Literal["cnn"] = "cnn"
    widths: Annotated[
        tuple[Count, ...], Field(min_length=1, max_length=4, description="channels; each but the first halves the image")
    ] = (
        16,
        32,
        64,
    )


class ResnetModel(Config):
    """A residual network with batch normalisation, one block per stage (He et al. 2016, CIFAR stem)."""

    kind: Literal["resnet"] = "resnet"
    widths: Annotated[tuple[Count, ...], Field(min_length=1, max_length=4)] = (16, 32, 64)
    blocks_per_stage: Count = 1


ModelConfig = Annotated[CnnModel | ResnetModel, Field(discriminator="kind")]
