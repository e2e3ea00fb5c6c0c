"""Where synthetic images come from."""

from typing import Annotated, Literal

from pydantic import Field

from proxyrob.config.base import Config, Count, OpenShare, Positive


class DiffusionProxy(Config):
    """A diffusion model in v-prediction, fitted to the training images only (Ho et al. 2020; Salimans & Ho 2022)."""

    kind: Literal["diffusion"] = "diffusion"
    num_images: Annotated[int, Field(gt=0, description="synthetic images to sample")] = 10_000
    conditional: Annotated[bool, Field(description="one distribution per class, rather than one for all")] = True
    width: Count = 256
    num_blocks: Count = 2
    steps: Annotated[int, Field(gt=0, description="training steps")] = 1500
    batch_size: Count = 128
    learning_rate: Positive = 4e-3
    ema_decay: OpenShare = 0.99
    sampler_steps: Annotated[int, Field(gt=1, description="DPM-Solver++ steps per image")] = 20


class JitterProxy(Config):
    """The control: training images plus Gaussian noise. A generative model has to beat this to be worth its cost."""

    kind: Literal["jitter"] = "jitter"
    num_images: Annotated[int, Field(gt=0, description="synthetic images to sample")] = 10_000
    sigma: Annotated[float, Field(gt=0.0, le=1.0, description="standard deviation in pixel units of [0,1]")] = 0.1


ProxyConfig = Annotated[DiffusionProxy | JitterProxy, Field(discriminator="kind")]


class SamplingConfig(Config):
    """How samples are cut into files."""

    shard_size: Annotated[int, Field(gt=0, description="images in a shard")] = 2500
    batch_size: Annotated[int, Field(gt=0, description="images sampled at once; the images do not depend on it")] = 1250
