"""Which stages there are, and the digest of each: known from the configuration alone, before any work."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from flows.settings import PUBLISHED_SETS, Settings
from proxyrob.config import (
    BlackBoxConfig,
    CertifyConfig,
    EvaluateConfig,
    PipelineConfig,
    RobustTrainConfig,
    SmoothAttackConfig,
    SmoothTrainConfig,
)
from proxyrob.config.base import Config, digest_of
from proxyrob.config.evaluate import CheckName
from proxyrob.config.label import LabelerConfig
from proxyrob.config.objective import NaturalObjective
from proxyrob.config.proxy import DiffusionProxy, JitterProxy, PublishedProxy, WeightedProxy, weighted_parts
from proxyrob.mix import SyntheticSet
from proxyrob.proxy import pin_proxy
from proxyrob.shards import GIVEN_LABELS
from proxyrob.source.fingerprint import pin_source
from proxyrob.storage import DataPlace, Stage
from proxyrob.threat import Threat

Variant = Literal["real-only", "mixed"]

FOLDER_DIGITS = 16
DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class VariantStages:
    """The stages of one model: trained robustly and evaluated; trained for smoothing and certified."""

    train: Stage
    evaluate: Stage
    sanity: Stage
    smooth: Stage
    certify: Stage


@dataclass(frozen=True)
class ProxyStages:
    """The stages of one proxy, and where its images and labels lie. ``fit`` is ``None`` where there is nothing to fit."""

    name: str
    weight: float
    config: DiffusionProxy | JitterProxy | PublishedProxy
    fit: Stage | None
    samples: Stage
    labels: Stage
    images_at: DataPlace
    labels_at: DataPlace

    @property
    def takes_given_labels(self) -> bool:
        """Whether the labels that the images came with are used, rather than votes."""
        return _takes_given_labels(self.config)

    @property
    def given_at(self) -> DataPlace:
        """Where the labels lie that a published set came with."""
        return self.images_at.below(f"labels/{GIVEN_LABELS}")

    @property
    def synthetic(self) -> SyntheticSet:
        """As training takes it."""
        return SyntheticSet(self.images_at, self.labels_at, self.weight, self.name)


@dataclass(frozen=True)
class Plan:
    """Every stage of one configuration. There are no ``proxies`` and ``labelers`` where all images are real."""

    config: PipelineConfig
    digest: str
    store: Path
    source: Stage
    proxies: tuple[ProxyStages, ...]
    labelers: tuple[Stage, Stage] | None
    variants: dict[Variant, VariantStages]
    export: Stage
    pictures: Stage

    @property
    def released(self) -> Variant:
        """The variant that is exported and registered."""
        return "mixed" if self.proxies else "real-only"

    @property
    def synthetic(self) -> tuple[SyntheticSet, ...]:
        """The synthetic images, as training takes them."""
        return tuple(proxy.synthetic for proxy in self.proxies)

    def twin(self, variant: Variant) -> Stage | None:
        """The training of another model of the same data, for a transfer attack on a variant."""
        return _twin(self.labelers, self.variants, variant)

    def labels(self, variant: Variant) -> tuple[Stage, ...]:
        """The stages that labelled the synthetic images a variant is trained on."""
        return _labels(self.proxies, variant)

    @property
    def run_name(self) -> str:
        """What the run's output folder is called."""
        return f"{self.config.name}-{self.digest[:8]}"

    def stages(self) -> Iterator[Stage]:
        """All stages in order."""
        yield self.source
        yield from self.labelers or ()
        for proxy in self.proxies:
            yield from (stage for stage in (proxy.fit, proxy.samples, proxy.labels) if stage is not None)
        for variant in self.variants.values():
            yield from (getattr(variant, field.name) for field in fields(variant))
        yield self.export
        yield self.pictures


def pin_config(config: PipelineConfig, settings: Settings) -> PipelineConfig:
    """Fill in the identity of whatever the configuration only names: files of real images, published sets.

    Raises ``DataIntegrityError`` or ``OSError`` when something is not there, or is another than the configuration says.
    """
    return config.replace(proxy=pin_proxy(config.proxy, settings.sets), source=pin_source(config.source))


def robust_training(config: PipelineConfig, variant: Variant) -> RobustTrainConfig:
    """How the robust classifier of a variant is trained."""
    return config.train if variant == "mixed" else RobustTrainConfig.model_validate(config.train.real_only())


def smooth_training(config: PipelineConfig, variant: Variant) -> SmoothTrainConfig:
    """How the base classifier for smoothing of a variant is trained."""
    return config.smooth if variant == "mixed" else SmoothTrainConfig.model_validate(config.smooth.real_only())


def labeler_training(labeler: LabelerConfig) -> RobustTrainConfig:
    """A labeler is trained as any classifier: naturally, on real images alone."""
    return RobustTrainConfig(
        objective=NaturalObjective(),
        synthetic_fraction=0.0,
        gamma=1.0,
        steps=labeler.steps,
        batch_size=labeler.batch_size,
        learning_rate=labeler.learning_rate,
        weight_decay=labeler.weight_decay,
        shift=labeler.shift,
    )


def derive_stage(
    store: Path, seed: int, kind: str, inputs: tuple[Stage, ...], *leaves: Config, folder: Path | None = None, **values: Any
) -> Stage:
    """The stage that follows from its inputs, its part of the configuration and the seed, and the folder it belongs in."""
    configuration = {
        **{type(leaf).__name__: leaf.identity() for leaf in leaves},
        **values,
        "seed": seed,
        "inputs": [[given.name, given.digest] for given in inputs],
    }
    digest = digest_of({"stage": kind, **configuration})
    return Stage(kind, digest, (folder or store / kind) / digest[:FOLDER_DIGITS], configuration)


def stage_folder(store: Path, kind: str, digest: str) -> Path:
    """Where a stage lies that somebody names: a record, a tag on a server.

    Raises ``ValueError`` for what is no digest, and might lead anywhere as a part of a path.
    """
    if DIGEST.fullmatch(digest) is None:
        raise ValueError(f"expected the digest of a stage {kind!r}, 64 hexadecimal digits, got {digest!r}; it was altered")
    return store / kind / digest[:FOLDER_DIGITS]


def source_stage(config: PipelineConfig, store: Path) -> Stage:
    """The real images."""
    return derive_stage(store, config.seed, "source", (), config.source)


def evaluate_stage(
    config: EvaluateConfig | BlackBoxConfig, source: Stage, train: Stage, threat: Threat, seed: int, store: Path
) -> Stage:
    """Attacks on the classifier that ``train`` ends with."""
    return derive_stage(store, seed, "evaluate", (source, train), config, threat=str(threat))


def sanity_stage(
    source: Stage, train: Stage, evaluate: Stage, labels: tuple[Stage, ...], twin: Stage | None, seed: int, store: Path
) -> Stage:
    """Checks of an evaluation; ``labels`` and ``twin`` are what they are made with besides."""
    evidence = (*labels, *(() if twin is None else (twin,)))
    return derive_stage(store, seed, "sanity", (source, train, evaluate, *evidence), checks=list(get_args(CheckName)))


def certify_stage(config: CertifyConfig, source: Stage, smooth: Stage, sigma: float, seed: int, store: Path) -> Stage:
    """Certificates of the smoothed classifier that ``smooth`` ends with."""
    return derive_stage(store, seed, "certify", (source, smooth), config, sigma=sigma)


def smooth_attack_stage(
    config: SmoothAttackConfig, source: Stage, smooth: Stage, sigma: float, threat: Threat, seed: int, store: Path
) -> Stage:
    """An attack on the smoothed classifier that ``smooth`` ends with."""
    return derive_stage(store, seed, "attack-smoothed", (source, smooth), config, sigma=sigma, threat=str(threat))


def export_stage(config: PipelineConfig, source: Stage, train: Stage, evaluate: Stage, store: Path) -> Stage:
    """The exported classifier that ``train`` ends with."""
    return derive_stage(store, config.seed, "export", (source, train, evaluate), name=model_name(config))


def plan_pipeline(config: PipelineConfig, store: Path, data: DataPlace | None = None) -> Plan:
    """Lay out the stages of ``config`` below ``store``, with synthetic images at ``data`` (without it below ``store`` too).

    Nothing is read or written. A published set must have its identity filled in (``pin_config``).
    """
    stage = partial(derive_stage, store, config.seed)
    source = source_stage(config, store)
    parts = weighted_parts(config.proxy)
    labelers = None
    if not all(_takes_given_labels(part.proxy) for part in parts):
        first, second = (
            stage("train", (source,), labeler.model, labeler_training(labeler))
            for labeler in (config.label.first, config.label.second)
        )
        labelers = (first, second)
    proxies: list[ProxyStages] = []
    for part in parts:
        planned = _plan_proxy(config, part, source, labelers, store, DataPlace.of(store) if data is None else data)
        taken = {other.name for other in proxies}
        names = (planned.name, *(f"{planned.name}-{number}" for number in range(2, len(parts) + 2)))
        proxies.append(replace(planned, name=next(name for name in names if name not in taken)))
    weights: dict[str, Any] = {} if len(proxies) < 2 else {"weights": [proxy.weight for proxy in proxies]}
    variants: dict[Variant, VariantStages] = {}
    for variant in ("real-only", "mixed") if proxies else ("real-only",):
        mixed = [stage for proxy in proxies for stage in (proxy.samples, proxy.labels)] if variant == "mixed" else []
        given: tuple[Stage, ...] = (source, *mixed)
        weighted = weights if mixed else {}
        train = stage("train", given, config.model, robust_training(config, variant), threat=str(config.threat), **weighted)
        smooth = stage("train", given, config.model, smooth_training(config, variant), **weighted)
        evaluate = evaluate_stage(config.evaluate, source, train, config.threat, config.seed, store)
        twin, labels = _twin(labelers, variants, variant), _labels(proxies, variant)
        variants[variant] = VariantStages(
            train=train,
            evaluate=evaluate,
            sanity=sanity_stage(source, train, evaluate, labels, twin, config.seed, store),
            smooth=smooth,
            certify=certify_stage(config.certify, source, smooth, config.smooth.objective.sigma, config.seed, store),
        )
    released = variants["mixed" if proxies else "real-only"]
    drawn = [source, *((proxies[0].samples, proxies[0].labels) if proxies else ())]
    drawn += [stage for stages in variants.values() for stage in (stages.train, stages.certify)]
    return Plan(
        config=config,
        digest=config.digest(),
        store=store,
        source=source,
        proxies=tuple(proxies),
        labelers=labelers,
        variants=variants,
        export=export_stage(config, source, released.train, released.evaluate, store),
        pictures=stage("pictures", tuple(drawn)),
    )


def _twin(labelers: tuple[Stage, Stage] | None, variants: dict[Variant, VariantStages], variant: Variant) -> Stage | None:
    """A labeler where there is one; else for the mixed model the one of real images alone, which itself has no twin."""
    if labelers is not None:
        return labelers[0]
    return variants["real-only"].train if variant == "mixed" else None


def _labels(proxies: Sequence[ProxyStages], variant: Variant) -> tuple[Stage, ...]:
    return tuple(proxy.labels for proxy in proxies) if variant == "mixed" else ()


def _takes_given_labels(proxy: DiffusionProxy | JitterProxy | PublishedProxy) -> bool:
    return isinstance(proxy, PublishedProxy) and proxy.labels == "given"


def _plan_proxy(
    config: PipelineConfig,
    part: WeightedProxy,
    source: Stage,
    labelers: tuple[Stage, Stage] | None,
    store: Path,
    data: DataPlace,
) -> ProxyStages:
    """The stages of one proxy. What it is worth in the mix is no part of what it makes."""
    stage, proxy = partial(derive_stage, store, config.seed), part.proxy
    fit = stage("proxy", (source,), proxy) if isinstance(proxy, DiffusionProxy) else None
    if isinstance(proxy, PublishedProxy):
        if proxy.sha256 is None:
            raise ValueError(f"the published set {proxy.name!r} has no identity yet: expected a configuration from pin_config")
        samples = stage("samples", (source,), proxy)
        images_at, name = data.below(f"{PUBLISHED_SETS}/{proxy.name}"), proxy.name
    else:
        samples = stage("samples", (source, fit) if fit else (source,), proxy, config.sampling)
        images_at, name = data.below(f"samples/{samples.folder.name}"), proxy.kind
    rule: dict[str, Any] = {"rule": "given"}
    voters: tuple[Stage, ...] = ()
    if labelers is not None and not _takes_given_labels(proxy):
        voters, rule = labelers, {"threshold": config.label.threshold}
    labels = stage("labels", (source, samples, *voters), folder=samples.folder / "labels", **rule)
    labels_at = images_at.below(f"labels/{labels.folder.name}")
    return ProxyStages(name, part.weight, proxy, fit, samples, labels, images_at, labels_at)


def model_name(config: PipelineConfig) -> str:
    """The registered model: data set and norm."""
    return f"{config.source.dataset}-{config.threat.norm}"
