"""Third part: how robust the classifiers are, by attack and by certificate."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prefect.futures import PrefectFuture

from flows.build_proxy import DataFutures
from flows.plan import Plan, Variant
from flows.running.stages import current_session, submit_stage
from proxyrob.certify import certify_classifier
from proxyrob.evaluate import check_sanity, evaluate_classifier


@dataclass(frozen=True)
class AttackFutures:
    """Verdicts on a classifier, and the checks whether they mean something."""

    evaluation: PrefectFuture[Any]
    sanity: PrefectFuture[Any]


def assess_attacks(
    plan: Plan, variant: Variant, built: DataFutures, trained: Mapping[Variant, PrefectFuture[Any]]
) -> AttackFutures:
    """Attack the classifier of a variant, then look for gradient masking, also through another model of the same data."""
    stages, given = plan.variants[variant], _given(plan)
    evaluation = submit_stage(
        evaluate_classifier,
        stages.evaluate,
        f"attack-{variant}",
        after=[trained[variant]],
        sharded=True,
        config=plan.config.evaluate,
        model=stages.train,
        threat=plan.config.threat,
        **given,
    )
    sanity = submit_stage(
        check_sanity,
        stages.sanity,
        f"sanity-{variant}",
        after=[evaluation, *built.labels, *trained.values()],
        model=stages.train,
        evaluation=stages.evaluate,
        twin=plan.twin(variant),
        labels=plan.labels(variant),
        **given,
    )
    return AttackFutures(evaluation, sanity)


def assess_certificates(plan: Plan, variant: Variant, after: Iterable[PrefectFuture[Any]]) -> PrefectFuture[Any]:
    """Certify the smoothed classifier of a variant."""
    stages = plan.variants[variant]
    return submit_stage(
        certify_classifier,
        stages.certify,
        f"certify-{variant}",
        after=after,
        sharded=True,
        config=plan.config.certify,
        sigma=plan.config.smooth.objective.sigma,
        model=stages.smooth,
        **_given(plan),
    )


def _given(plan: Plan) -> dict[str, Any]:
    return {"source": plan.source, "seed": plan.config.seed, "device": current_session().device}
