"""Where synthetic images come from."""

from typing import Annotated, ClassVar, Literal

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


class PublishedProxy(Config):
    """A set of images that was imported (``proxyrob import``), such as samples that others have published."""

    MEANS: ClassVar[frozenset[str]] = frozenset({"name"})

    kind: Literal["published"] = "published"
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="the name it was imported under")]
    labels: Annotated[
        Literal["given", "labelers"], Field(description="the labels it came with, or the votes of our labelers")
    ] = "given"
    sha256: Annotated[
        str | None,
        Field(pattern=r"^[0-9a-f]{64}$", description="identity of its images; filled in from the set when it is not given"),
    ] = None
    num_images: Annotated[int | None, Field(gt=0, description="filled in from the set when it is not given")] = None


SingleProxy = Annotated[DiffusionProxy | JitterProxy | PublishedProxy, Field(discriminator="kind")]


class WeightedProxy(Config):
    """One of several proxies."""

    weight: Annotated[Positive, Field(description="how much of the synthetic part of a batch is drawn from it")] = 1.0
    proxy: SingleProxy


class MixtureProxy(Config):
    """Several proxies at once."""

    kind: Literal["mixture"] = "mixture"
    parts: Annotated[tuple[WeightedProxy, ...], Field(min_length=2)]


ProxyConfig = Annotated[DiffusionProxy | JitterProxy | PublishedProxy | MixtureProxy, Field(discriminator="kind")]


def weighted_parts(proxy: ProxyConfig | None) -> tuple[WeightedProxy, ...]:
    """The proxies there are, with their weights."""
    if proxy is None:
        return ()
    return proxy.parts if isinstance(proxy, MixtureProxy) else (WeightedProxy(proxy=proxy),)


class SamplingConfig(Config):
    """How samples are cut into files."""

    shard_size: Annotated[int, Field(gt=0, description="images in a shard")] = 2500
    batch_size: Annotated[int, Field(gt=0, description="images sampled at once; the images do not depend on it")] = 1250
