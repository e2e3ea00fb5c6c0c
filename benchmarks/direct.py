"""What `proxyrob run` computes, as calls of the library in one process: neither Prefect nor MLflow is imported.

    .venv/bin/python benchmarks/direct.py PRESET HOME [key=value …]

Prints which of the two were imported all the same, as JSON. Stages that are finished below HOME are not done again.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from flows.plan import Plan, labeler_training, pin_config, plan_pipeline, robust_training, smooth_training
from flows.settings import Settings
from proxyrob.certify import certify_classifier, read_certificates
from proxyrob.compare import compare_certificates, compare_where_possible
from proxyrob.config import load_config
from proxyrob.evaluate import check_sanity, evaluate_classifier, read_verdicts
from proxyrob.export import export_classifier
from proxyrob.figures import draw_run
from proxyrob.label import label_shards
from proxyrob.proxy import fit_diffusion, sample_proxy
from proxyrob.source import prepare_source
from proxyrob.train import train_classifier


def make_data(plan: Plan) -> None:
    """Real images, the proxy, samples, labels."""
    config, source = plan.config, plan.source
    prepare_source(config.source, seed=config.seed, downloads=plan.store.parent / "downloads", stage=source)
    assert plan.labelers is not None
    for stage, labeler in zip(plan.labelers, (config.label.first, config.label.second), strict=True):
        training = labeler_training(labeler)
        train_classifier(labeler.model, training, source=source, synthetic=(), threat=None, seed=config.seed, stage=stage)
    (proxy,) = plan.proxies
    assert proxy.fit is not None
    given: dict[str, Any] = {"config": proxy.config, "source": source, "seed": config.seed}
    fit_diffusion(**given, stage=proxy.fit)
    sample_proxy(**given, sampling=config.sampling, proxy=proxy.fit, images=proxy.images_at, stage=proxy.samples)
    label_shards(
        config.label.threshold,
        source=source,
        images=proxy.images_at,
        first=plan.labelers[0],
        second=plan.labelers[1],
        labels=proxy.labels_at,
        stage=proxy.labels,
    )


def train_and_assess(plan: Plan) -> None:
    """Both models of both kinds, attacked, checked and certified; the released one exported."""
    config, source = plan.config, plan.source
    for variant, stages in plan.variants.items():
        given: dict[str, Any] = {"source": source, "seed": config.seed}
        synthetic = plan.synthetic if variant == "mixed" else ()
        for stage, training, threat in (
            (stages.train, robust_training(config, variant), config.threat),
            (stages.smooth, smooth_training(config, variant), None),
        ):
            train_classifier(config.model, training, synthetic=synthetic, threat=threat, stage=stage, **given)
        evaluate_classifier(config.evaluate, model=stages.train, threat=config.threat, stage=stages.evaluate, **given)
        checked = {"evaluation": stages.evaluate, "twin": plan.twin(variant), "labels": plan.labels(variant)}
        check_sanity(model=stages.train, stage=stages.sanity, **checked, **given)
        sigma = config.smooth.objective.sigma
        certify_classifier(config.certify, sigma=sigma, model=stages.smooth, stage=stages.certify, **given)
    released = plan.variants[plan.released]
    export_classifier(
        name="direct",
        training="",
        training_data="",
        source=source,
        model=released.train,
        evaluation=released.evaluate,
        seed=config.seed,
        stage=plan.export,
    )


def conclude(plan: Plan) -> None:
    """The pictures and the comparison."""
    draw_run(
        "synthetic images",
        source=plan.source,
        synthetic=plan.synthetic[0],
        trainings={name: stages.train for name, stages in plan.variants.items()},
        certifications={name: stages.certify for name, stages in plan.variants.items()},
        stage=plan.pictures,
    )
    mixed, real = plan.variants["mixed"], plan.variants["real-only"]
    compare_where_possible(read_verdicts(mixed.evaluate), read_verdicts(real.evaluate))
    certify = plan.config.certify
    compare_certificates(read_certificates(mixed.certify), read_certificates(real.certify), certify.radii, certify.linf)


def main() -> None:
    preset, home, *changes = sys.argv[1:]
    torch.set_num_threads(1)
    settings = Settings(home=Path(home))
    plan = plan_pipeline(pin_config(load_config(preset, tuple(changes)), settings), settings.store, settings.place)
    make_data(plan)
    train_and_assess(plan)
    conclude(plan)
    foreign = sorted(name for name in ("prefect", "mlflow") if name in sys.modules)
    print(json.dumps({"imported": foreign}))


if __name__ == "__main__":
    main()
