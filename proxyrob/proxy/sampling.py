"""Sampling a proxy into shards."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from jaxtyping import Int64, UInt8

from proxyrob.config.proxy import DiffusionProxy, JitterProxy, SamplingConfig
from proxyrob.errors import DataIntegrityError
from proxyrob.memory import at_most
from proxyrob.proxy.diffusion import DiffusionSampler
from proxyrob.proxy.jitter import JitterSampler
from proxyrob.shards import (
    MANIFEST,
    ShardManifest,
    describe_shards,
    in_workers_order,
    read_shard,
    shard_name,
    write_manifest,
    write_shard,
)
from proxyrob.source import source_report
from proxyrob.storage import DataPlace, FileEntry, Report, Stage
from proxyrob.storage.shared import SharedFiles, finish_once
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
    sha256: str


def sample_proxy(
    config: DiffusionProxy | JitterProxy,
    sampling: SamplingConfig,
    *,
    source: Stage,
    proxy: Stage | None,
    seed: int,
    stage: Stage,
    images: DataPlace | None = None,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> SamplesReport:
    """Sample ``config.num_images`` images into shards at ``images`` (without it in the stage's own folder).

    A shard that is already there is left as it is. Any number of workers, on any number of machines, may call this for the
    same place at once, with one stage or each with its own: each shard is sampled by whoever claims it first, and all return
    when all shards are there. ``proxy`` is the stage that fitted the generator; the jitter control has none. Raises
    ``DataIntegrityError`` when more than one image in a hundred is constant: such a generator has collapsed.
    """
    return finish_once(
        stage,
        SamplesReport,
        lambda started: _sample(config, sampling, source, proxy, seed, stage, images, device, on_progress, started),
    )


def _sample(
    config: DiffusionProxy | JitterProxy,
    sampling: SamplingConfig,
    source: Stage,
    proxy: Stage | None,
    seed: int,
    stage: Stage,
    images: DataPlace | None,
    device: str,
    on_progress: OnProgress,
    started: float,
) -> SamplesReport:
    place = DataPlace.of(stage.folder) if images is None else images
    real = source_report(source)
    channels, height, width = real.image_shape
    sampler = _sampler(config, source=source, proxy=proxy, seed=seed, device=device)
    firsts = range(0, config.num_images, sampling.shard_size)
    shards = {shard_name(k): (first, min(sampling.shard_size, config.num_images - first)) for k, first in enumerate(firsts)}
    counted: dict[str, int] = {}
    num_there, size = 0, at_most(sampling.batch_size)

    def sample_shard(name: str) -> None:
        first, count = shards[name]
        pieces = []
        for start in range(first, first + count, size):
            on_progress(num_there + start - first, config.num_images)
            pieces.append(sampler.sample(np.arange(start, min(start + size, first + count))))
        shard = np.concatenate(pieces)
        counted[name] = count_constant(shard)
        write_shard(place, name, shard)

    def tell(done: set[str]) -> bool:
        nonlocal num_there
        num_there = sum(shards[name][1] for name in done)
        on_progress(num_there, config.num_images)
        return False

    work = SharedFiles(place, ".npy", stage.is_whole)
    work.complete(in_workers_order(list(shards)), sample_shard, tell)

    def conclude() -> SamplesReport:
        manifest = describe_shards(
            place,
            shards=[(name, *cut) for name, cut in shards.items()],
            image_shape=(height, width, channels),
            generator=proxy.digest if proxy else stage.digest,
            source_sha256=real.content_sha256,
            sampler=config.dump(),
            seed=seed,
        )
        constant = count_all_constant(place, manifest, counted)
        if constant > config.num_images // 100:
            raise DataIntegrityError(
                f"{constant} of {config.num_images} sampled images are constant: the generator has collapsed; "
                "train it longer (proxy.steps) or with a lower proxy.learning_rate"
            )
        write_manifest(place, manifest)
        report = SamplesReport(
            num_images=config.num_images,
            num_shards=len(shards),
            image_shape=real.image_shape,
            constant_images=constant,
            sha256=manifest.sha256,
        )
        known = [FileEntry(name=shard.key, size_bytes=shard.size_bytes, sha256=shard.sha256) for shard in manifest.shards]
        return stage.finish(report, [MANIFEST, *known] if place.is_folder(stage.folder) else [], started)

    return work.conclude(conclude)


def count_constant(images: UInt8[np.ndarray, "n h w c"]) -> int:
    """How many images are of one single value."""
    flat = images.reshape(len(images), -1)
    return int((flat == flat[:, :1]).all(axis=1).sum())


def count_all_constant(
    place: DataPlace, manifest: ShardManifest, counted: Mapping[str, int], on_progress: OnProgress = no_progress
) -> int:
    """How many images of a set are of one single value; of the shards only those that are not ``counted`` yet are read.

    Raises ``DataIntegrityError`` when one of these is missing or damaged.
    """
    constant = done = 0
    for shard in manifest.shards:
        if shard.name in counted:
            constant += counted[shard.name]
        else:
            constant += count_constant(read_shard(place, shard, manifest.image_shape, mapped=True))
        done += shard.num_images
        on_progress(done, manifest.num_images)
    return constant


def _sampler(config: DiffusionProxy | JitterProxy, *, source: Stage, proxy: Stage | None, seed: int, device: str) -> Sampler:
    match config:
        case DiffusionProxy():
            if proxy is None:
                raise ValueError("expected the stage that fitted the diffusion model, got None")
            return DiffusionSampler(config, source=source, proxy=proxy, seed=seed, device=device)
        case JitterProxy():
            return JitterSampler(config, source=source, seed=seed)
