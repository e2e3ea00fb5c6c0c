"""Which stages there are, and the digest of each: known from the configuration alone, before any work."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from proxyrob.config import CertifyConfig, EvaluateConfig, PipelineConfig, RobustTrainConfig, SmoothTrainConfig
from proxyrob.config.base import Config, digest_of
from proxyrob.config.label import LabelerConfig
from proxyrob.config.proxy import DiffusionProxy
from proxyrob.config.train import NaturalObjective, PgdObjective, TradesObjective
from proxyrob.storage import Stage
from proxyrob.threat import Threat

Variant = Literal["real-only", "mixed"]

FOLDER_DIGITS = 16


@dataclass(frozen=True)
class VariantStages:
    """The stages of one model: trained robustly and evaluated; trained for smoothing and certified."""

    train: Stage
    evaluate: Stage
    sanity: Stage
    smooth: Stage
    certify: Stage


@dataclass(frozen=True)
class Plan:
    """Every stage of one configuration. The stages of the proxy are ``None`` where there is none."""

    config: PipelineConfig
    digest: str
    store: Path
    source: Stage
    proxy: Stage | None
    samples: Stage | None
    labelers: tuple[Stage, Stage] | None
    labels: Stage | None
    variants: dict[Variant, VariantStages]
    export: Stage
    pictures: Stage

    @property
    def released(self) -> Variant:
        """The variant that is exported and registered."""
        return "mixed" if self.samples is not None else "real-only"

    @property
    def synthetic(self) -> tuple[Stage, Stage] | None:
        """Samples and labels, as training takes them."""
        return (self.samples, self.labels) if self.samples is not None and self.labels is not None else None

    @property
    def run_name(self) -> str:
        """What the run's output folder is called."""
        return f"{self.config.name}-{self.digest[:8]}"

    def stages(self) -> Iterator[Stage]:
        """All stages in order."""
        yield self.source
        yield from (stage for stage in (self.proxy, self.samples, *(self.labelers or ()), self.labels) if stage is not None)
        for variant in self.variants.values():
            yield from (getattr(variant, field.name) for field in fields(variant))
        yield self.export
        yield self.pictures


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


def evaluate_stage(config: EvaluateConfig, source: Stage, train: Stage, threat: Threat, seed: int, store: Path) -> Stage:
    """Attacks on the classifier that ``train`` ends with."""
    return derive_stage(store, seed, "evaluate", (source, train), config, threat=str(threat))


def certify_stage(config: CertifyConfig, source: Stage, smooth: Stage, sigma: float, seed: int, store: Path) -> Stage:
    """Certificates of the smoothed classifier that ``smooth`` ends with."""
    return derive_stage(store, seed, "certify", (source, smooth), config, sigma=sigma)


def export_stage(config: PipelineConfig, source: Stage, train: Stage, evaluate: Stage, store: Path) -> Stage:
    """The exported classifier that ``train`` ends with."""
    return derive_stage(store, config.seed, "export", (source, train, evaluate), name=model_name(config))


def plan_pipeline(config: PipelineConfig, store: Path) -> Plan:
    """Lay out the stages of ``config`` below ``store``; nothing is read or written."""
    stage = partial(derive_stage, store, config.seed)
    source = stage("source", (), config.source)
    proxy = samples = labels = labelers = None
    if config.proxy is not None:
        if isinstance(config.proxy, DiffusionProxy):
            proxy = stage("proxy", (source,), config.proxy)
        samples = stage("samples", (source, proxy) if proxy else (source,), config.proxy, config.sampling)
        first, second = (
            stage("train", (source,), labeler.model, labeler_training(labeler))
            for labeler in (config.label.first, config.label.second)
        )
        labelers = (first, second)
        labels = stage(
            "labels", (source, samples, first, second), threshold=config.label.threshold, folder=samples.folder / "labels"
        )
    variants: dict[Variant, VariantStages] = {}
    for variant in ("real-only", "mixed") if samples is not None else ("real-only",):
        given = (source, samples, labels) if variant == "mixed" and samples and labels else (source,)
        train = stage("train", given, config.model, robust_training(config, variant), threat=str(config.threat))
        smooth = stage("train", given, config.model, smooth_training(config, variant))
        evaluate = evaluate_stage(config.evaluate, source, train, config.threat, config.seed, store)
        variants[variant] = VariantStages(
            train=train,
            evaluate=evaluate,
            sanity=stage("sanity", (source, train, evaluate), norm=config.threat.norm),
            smooth=smooth,
            certify=certify_stage(config.certify, source, smooth, config.smooth.objective.sigma, config.seed, store),
        )
    released = variants["mixed" if samples is not None else "real-only"]
    drawn = [source, *((samples, labels) if samples and labels else ())]
    drawn += [stage for stages in variants.values() for stage in (stages.train, stages.certify)]
    return Plan(
        config=config,
        digest=config.digest(),
        store=store,
        source=source,
        proxy=proxy,
        samples=samples,
        labelers=labelers,
        labels=labels,
        variants=variants,
        export=export_stage(config, source, released.train, released.evaluate, store),
        pictures=stage("pictures", tuple(drawn)),
    )


def describe_training(config: PipelineConfig, variant: Variant) -> str:
    """The training of a variant, for its card."""
    train = robust_training(config, variant)
    match train.objective:
        case PgdObjective(attack_steps=steps):
            method = f"PGD-{steps} adversarial training"
        case TradesObjective(attack_steps=steps, beta=beta):
            method = f"TRADES (beta {beta:g}, {steps} attack steps)"
        case NaturalObjective():
            method = "natural training"
    parts = f", {train.num_synthetic} of them synthetic, gamma {train.gamma:g}" if train.num_synthetic else ""
    return (
        f"{method} against {config.threat}, {train.steps} steps of {train.batch_size} images{parts}, AdamW, "
        f"weight average {train.ema_decay:g}"
    )


def describe_data(config: PipelineConfig, variant: Variant) -> str:
    """The training data of a variant, for its card."""
    real = f"{config.source.num_train} real images of {config.source.kind}"
    if variant == "real-only" or config.proxy is None:
        return real
    return f"{real} and {config.proxy.num_images:,} synthetic ones ({config.proxy.kind} proxy fitted to the same real images)"


def model_name(config: PipelineConfig) -> str:
    """The registered model: data set and norm."""
    return f"{config.source.kind}-{config.threat.norm}"
