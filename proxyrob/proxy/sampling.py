"""Sampling a proxy into shards."""

import time
from typing import Protocol

import numpy as np
from jaxtyping import Int64, UInt8

from proxyrob.config.proxy import DiffusionProxy, JitterProxy, SamplingConfig
from proxyrob.errors import DataIntegrityError
from proxyrob.proxy.diffusion import DiffusionSampler
from proxyrob.proxy.jitter import JitterSampler
from proxyrob.shards import MANIFEST, shard_name, write_manifest
from proxyrob.source import source_report
from proxyrob.storage import Report, Stage
from proxyrob.storage.files import read_array, write_array
from proxyrob.types import OnProgress, no_progress


class Sampler(Protocol):
    """Anything that draws image i from (generator, seed, i) alone."""

    def sample(self, ids: Int64[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w c"]: ...


class SamplesReport(Report):
    """A set of synthetic images."""

    num_images: int
    num_shards: int
    image_shape: tuple[int, int, int]
    constant_images: int


def sample_proxy(
    config: DiffusionProxy | JitterProxy,
    sampling: SamplingConfig,
    *,
    source: Stage,
    proxy: Stage | None,
    seed: int,
    stage: Stage,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> SamplesReport:
    """Sample ``config.num_images`` images into shards; a shard that is already there is left as it is.

    ``proxy`` is the stage that fitted the generator; the jitter control has none. Raises ``DataIntegrityError`` when
    more than one image in a hundred is constant: such a generator has collapsed.
    """
    if (report := stage.finished(SamplesReport)) is not None:
        return report
    started = time.monotonic()
    real = source_report(source)
    sampler = _sampler(config, source=source, proxy=proxy, seed=seed, device=device)
    shards = []
    constant = 0
    for number, first in enumerate(range(0, config.num_images, sampling.shard_size)):
        count = min(sampling.shard_size, config.num_images - first)
        name = shard_name(number)
        path = stage.folder / f"{name}.npy"
        if not path.is_file():
            pieces = []
            for start in range(first, first + count, sampling.batch_size):
                pieces.append(sampler.sample(np.arange(start, min(start + sampling.batch_size, first + count))))
                on_progress(start, config.num_images)
            write_array(path, np.concatenate(pieces))
        images = read_array(path, mapped=True)
        flat = images.reshape(len(images), -1)
        constant += int((flat.min(axis=1) == flat.max(axis=1)).sum())
        shards.append((name, first, count))
        on_progress(first + count, config.num_images)
    if constant > config.num_images // 100:
        raise DataIntegrityError(
            f"{constant} of {config.num_images} sampled images are constant: the generator has collapsed; "
            "train it longer (proxy.steps) or with a lower proxy.learning_rate"
        )
    channels, height, width = real.image_shape
    write_manifest(
        stage.folder,
        shards=shards,
        image_shape=(height, width, channels),
        generator=proxy.digest if proxy else stage.digest,
        source_sha256=real.content_sha256,
        sampler=config.dump(),
        seed=seed,
    )
    report = SamplesReport(
        num_images=config.num_images, num_shards=len(shards), image_shape=real.image_shape, constant_images=constant
    )
    return stage.finish(report, [MANIFEST, *(f"{name}.npy" for name, _, _ in shards)], started)


def _sampler(config: DiffusionProxy | JitterProxy, *, source: Stage, proxy: Stage | None, seed: int, device: str) -> Sampler:
    match config:
        case DiffusionProxy():
            if proxy is None:
                raise ValueError("expected the stage that fitted the diffusion model, got None")
            return DiffusionSampler(config, source=source, proxy=proxy, seed=seed, device=device)
        case JitterProxy():
            return JitterSampler(config, source=source, seed=seed)
