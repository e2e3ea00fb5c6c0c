"""Second part: classifiers trained on real and synthetic images together."""

from typing import Any

from prefect.futures import PrefectFuture

from flows.build_proxy import DataFutures
from flows.plan import Plan, Variant, robust_training, smooth_training
from flows.running.stages import OnFigures, current_session, submit_stage
from proxyrob.config.proxy import weighted_parts
from proxyrob.mix import require_equal_shares, split_count
from proxyrob.train import train_classifier, train_in_processes


def require_shares(plan: Plan, num_processes: int) -> None:
    """Let every training of a plan give each of several processes its share of every batch.

    Raises ``ValueError`` where one cannot.
    """
    weights = [part.weight for part in weighted_parts(plan.config.proxy)]
    for variant in plan.variants:
        for training in (robust_training(plan.config, variant), smooth_training(plan.config, variant)):
            num_synthetic = training.num_synthetic
            counts = (training.batch_size - num_synthetic, *(split_count(num_synthetic, weights) if num_synthetic else ()))
            require_equal_shares(counts, num_processes, in_pairs=training.cutmix > 0.0)


def train_robust(plan: Plan, variant: Variant, built: DataFutures, curve: OnFigures | None = None) -> PrefectFuture[Any]:
    """Train the classifier of a variant against the threat model; ``curve`` is told its figures while it runs."""
    return _train(plan, variant, built, curve, robust=True)


def train_smooth(plan: Plan, variant: Variant, built: DataFutures, curve: OnFigures | None = None) -> PrefectFuture[Any]:
    """Train the base classifier of a variant for randomized smoothing; ``curve`` is told its figures while it runs."""
    return _train(plan, variant, built, curve, robust=False)


def _train(plan: Plan, variant: Variant, built: DataFutures, curve: OnFigures | None, *, robust: bool) -> PrefectFuture[Any]:
    stages = plan.variants[variant]
    labels = built.labels if variant == "mixed" else ()
    settings = current_session().settings
    processes = settings.processes
    several: dict[str, Any] = {} if processes == 1 else {"num_processes": processes}
    return submit_stage(
        train_in_processes if several else train_classifier,
        stages.train if robust else stages.smooth,
        f"{'train' if robust else 'smooth'}-{variant}",
        after=[built.source, *labels],
        model=plan.config.model,
        config=(robust_training if robust else smooth_training)(plan.config, variant),
        source=plan.source,
        synthetic=plan.synthetic if variant == "mixed" else (),
        threat=plan.config.threat if robust else None,
        seed=plan.config.seed,
        device=current_session().device,
        checkpoints_at=settings.checkpoints,
        on_figures=curve,
        stoppable=True,
        **several,
    )
