"""Network architectures."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from proxyrob.config.base import Config, Count

Activation = Literal["relu", "silu"]
BaseChannels = Annotated[Count, Field(description="channels of the first stage; each further stage has twice as many")]


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
    blocks_per_stage: Annotated[int, Field(gt=0, le=1000)] = 1


class StandardResnetModel(Config):
    """ResNet-18, -34 or -50 (He et al. 2016, table 1) with a 3×3 convolution for a stem, for images of 8×8 pixels and more."""

    kind: Literal["standard-resnet"] = "standard-resnet"
    depth: Literal[18, 34, 50] = 18
    base_channels: BaseChannels = 64
    activation: Activation = "relu"


class PreactResnetModel(Config):
    """ResNet-18 or -34 with normalisation and activation before each convolution, for images of 8×8 pixels and more.

    ``standard`` is the network of He et al. 2016, «Identity Mappings»: projections are 1×1 and take the activated input.
    ``deepmind`` is that of Gowal et al. 2021: projections are 3×3 and take the input itself, and strided convolutions pad
    even images at the bottom and on the right alone.
    """

    kind: Literal["preact-resnet"] = "preact-resnet"
    depth: Literal[18, 34] = 18
    base_channels: BaseChannels = 64
    activation: Activation = "relu"
    variant: Literal["standard", "deepmind"] = "standard"


DEEPEST = 6004
"""A thousand blocks in each stage. A file that says what network its weights are of is not believed to mean more."""


def _whole_blocks(depth: int) -> int:
    if not 10 <= depth <= DEEPEST or (depth - 4) % 6:
        raise ValueError(f"expected 10, 16, 22, 28, 34, … (4, and 6 for each block of a stage; at most {DEEPEST}), got {depth}")
    return depth


class WideResnetModel(Config):
    """WRN-``depth``-``width`` (Zagoruyko & Komodakis 2016, without dropout), for images of 4×4 pixels and more.

    ``standard`` pads every convolution by a pixel on each side. ``deepmind`` is the network of Gowal et al. 2020: strided
    convolutions pad even images at the bottom and on the right alone. Each has its published checkpoints.
    """

    kind: Literal["wide-resnet"] = "wide-resnet"
    depth: Annotated[int, AfterValidator(_whole_blocks)] = 28
    width: Annotated[Count, Field(description="how many times 16, 32 and 64 channels the three stages have")] = 10
    activation: Activation = "relu"
    variant: Literal["standard", "deepmind"] = "standard"


ModelConfig = Annotated[
    CnnModel | ResnetModel | StandardResnetModel | PreactResnetModel | WideResnetModel, Field(discriminator="kind")
]
