"""First part of the path: real images, a proxy fitted to them, samples, labels."""

from dataclasses import dataclass
from typing import Any

from prefect.futures import PrefectFuture

from flows.plan import Plan, labeler_training
from flows.stages import current_session, submit_stage
from proxyrob.label import label_shards
from proxyrob.proxy import fit_diffusion, sample_proxy
from proxyrob.source import prepare_digits
from proxyrob.train import train_classifier


@dataclass(frozen=True)
class ProxyFutures:
    """``samples`` and ``labels`` are ``None`` where the configuration has no proxy."""

    source: PrefectFuture[Any]
    proxy: PrefectFuture[Any] | None
    samples: PrefectFuture[Any] | None
    labels: PrefectFuture[Any] | None


def build_proxy(plan: Plan) -> ProxyFutures:
    """Prepare real images and, where there is a proxy, the labelled samples."""
    config, device = plan.config, current_session().device
    seed = config.seed
    source = submit_stage(prepare_digits, plan.source, "source", config=config.source, seed=seed)
    if config.proxy is None or plan.samples is None or plan.labels is None or plan.labelers is None:
        return ProxyFutures(source, None, None, None)
    given = {"source": plan.source, "seed": seed, "device": device}
    proxy = None
    if plan.proxy is not None:
        proxy = submit_stage(fit_diffusion, plan.proxy, "proxy", after=[source], config=config.proxy, **given)
    samples = submit_stage(
        sample_proxy,
        plan.samples,
        "samples",
        after=[proxy or source],
        config=config.proxy,
        sampling=config.sampling,
        proxy=plan.proxy,
        **given,
    )
    labelers = [
        submit_stage(
            train_classifier,
            stage,
            f"labeler-{labeler.model.kind}",
            after=[source],
            model=labeler.model,
            config=labeler_training(labeler),
            synthetic=None,
            threat=None,
            **given,
        )
        for stage, labeler in zip(plan.labelers, (config.label.first, config.label.second), strict=True)
    ]
    labels = submit_stage(
        label_shards,
        plan.labels,
        "labels",
        after=[samples, *labelers],
        threshold=config.label.threshold,
        samples=plan.samples,
        first=plan.labelers[0],
        second=plan.labelers[1],
        source=plan.source,
        device=device,
    )
    return ProxyFutures(source, proxy, samples, labels)
