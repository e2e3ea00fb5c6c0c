"""First part of the path: real images, proxies fitted to them, samples, labels."""

from dataclasses import dataclass
from typing import Any

from prefect.futures import PrefectFuture

from flows.plan import Plan, ProxyStages, labeler_training
from flows.running.stages import current_session, submit_stage
from proxyrob.config.proxy import PublishedProxy
from proxyrob.label import adopt_labels, label_shards
from proxyrob.proxy import adopt_samples, fit_diffusion, sample_proxy
from proxyrob.shards import is_complete
from proxyrob.source import SourceReport, prepare_source
from proxyrob.train import train_classifier

Future = PrefectFuture[Any]


@dataclass(frozen=True)
class DataFutures:
    """Real images, and the labels of every proxy's images."""

    source: Future
    labels: tuple[Future, ...]


def build_proxy(plan: Plan) -> DataFutures:
    """Prepare real images and, where there are proxies, their labelled samples."""
    config = plan.config
    source = submit_stage(
        prepare_source,
        plan.source,
        "source",
        config=config.source,
        seed=config.seed,
        downloads=current_session().settings.downloads,
    )
    _require_enough(plan, source)
    for proxy in plan.proxies:
        _forget_what_is_lost(proxy)
    samples = [_submit_samples(plan, proxy, source) for proxy in plan.proxies]
    labelers = _submit_labelers(plan, source)
    labels = [_submit_labels(plan, proxy, [made, *labelers]) for proxy, made in zip(plan.proxies, samples, strict=True)]
    return DataFutures(source, tuple(labels))


def _require_enough(plan: Plan, source: Future) -> None:
    """Raise ``ValueError`` when more images are to be certified than there are, before the long work begins."""
    source.wait()
    real, wanted = plan.source.finished(SourceReport), plan.config.certify.num_images
    if real is not None and wanted > real.num_test:
        raise ValueError(f"certify.num_images is {wanted}, more than the {real.num_test} images of the test split")


def _forget_what_is_lost(proxy: ProxyStages) -> None:
    """A finished stage whose images or labels are no longer in the store has to be done again, as far as they are gone."""
    if proxy.samples.record() is not None and not is_complete(proxy.images_at):
        proxy.samples.forget()
    if proxy.labels.record() is not None and not is_complete(proxy.images_at, proxy.labels_at):
        proxy.labels.forget()


def _submit_samples(plan: Plan, proxy: ProxyStages, source: Future) -> Future:
    device = current_session().device
    label = _label("samples", plan, proxy)
    if isinstance(proxy.config, PublishedProxy):
        given = {"config": proxy.config, "source": plan.source, "images": proxy.images_at}
        return submit_stage(adopt_samples, proxy.samples, label, after=[source], **given)
    given = {"config": proxy.config, "source": plan.source, "seed": plan.config.seed}
    fitted = source
    if proxy.fit is not None:  # what is not fitted computes on no device either
        given["device"] = device
        fitted = submit_stage(fit_diffusion, proxy.fit, _label("proxy", plan, proxy), after=[source], **given)
    return submit_stage(
        sample_proxy,
        proxy.samples,
        label,
        after=[fitted],
        sharded=True,
        sampling=plan.config.sampling,
        proxy=proxy.fit,
        images=proxy.images_at,
        **given,
    )


def _submit_labelers(plan: Plan, source: Future) -> list[Future]:
    if plan.labelers is None:
        return []
    return [
        submit_stage(
            train_classifier,
            stage,
            f"labeler-{labeler.model.kind}",
            after=[source],
            stoppable=True,
            model=labeler.model,
            config=labeler_training(labeler),
            source=plan.source,
            synthetic=(),
            threat=None,
            seed=plan.config.seed,
            device=current_session().device,
        )
        for stage, labeler in zip(plan.labelers, (plan.config.label.first, plan.config.label.second), strict=True)
    ]


def _submit_labels(plan: Plan, proxy: ProxyStages, after: list[Future]) -> Future:
    label = _label("labels", plan, proxy)
    given = {"source": plan.source, "labels": proxy.labels_at, "device": current_session().device}
    if proxy.takes_given_labels:
        return submit_stage(
            adopt_labels,
            proxy.labels,
            label,
            after=after[:1],
            sharded=True,
            images=proxy.images_at,
            given=proxy.given_at,
            **given,
        )
    assert plan.labelers is not None  # planned whenever a proxy needs them
    return submit_stage(
        label_shards,
        proxy.labels,
        label,
        after=after,
        sharded=True,
        threshold=plan.config.label.threshold,
        images=proxy.images_at,
        first=plan.labelers[0],
        second=plan.labelers[1],
        **given,
    )


def _label(stage: str, plan: Plan, proxy: ProxyStages) -> str:
    """How a stage of a proxy is called; by its proxy where there are several."""
    return stage if len(plan.proxies) == 1 else f"{stage}-{proxy.name}"
