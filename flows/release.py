"""Last part: export, pictures, comparison, record, registration and promotion."""

from collections.abc import Iterable
from typing import Any

from prefect import task
from prefect.events import emit_event
from prefect.futures import PrefectFuture

from flows.describe import describe_data, describe_training
from flows.plan import Plan, model_name
from flows.records.champions import ChangeName
from flows.records.registry import Registration, register_model
from flows.records.tracking import Tracker
from flows.running.stages import submit_stage
from proxyrob.certify import read_certificates
from proxyrob.compare import Comparison, Incomparable, compare_certificates, compare_where_possible
from proxyrob.evaluate import read_verdicts
from proxyrob.export import export_classifier
from proxyrob.figures import draw_run

CHAMPION_EVENT = "proxyrob.champion"


def export_released(plan: Plan, after: Iterable[PrefectFuture[Any]]) -> PrefectFuture[Any]:
    """Export the released variant to ONNX and prove that it equals the trained model."""
    stages = plan.variants[plan.released]
    return submit_stage(
        export_classifier,
        plan.export,
        "export",
        after=after,
        name=model_name(plan.config),
        training=describe_training(plan.config, plan.released),
        training_data=describe_data(plan.config, plan.released),
        source=plan.source,
        model=stages.train,
        evaluation=stages.evaluate,
        seed=plan.config.seed,
    )


def draw_pictures(plan: Plan, after: Iterable[PrefectFuture[Any]]) -> PrefectFuture[Any]:
    """Draw the pictures of the run."""
    return submit_stage(
        draw_run,
        plan.pictures,
        "pictures",
        after=after,
        synthetic_name=f"synthetic images ({plan.proxies[0].name})" if plan.proxies else "",
        source=plan.source,
        synthetic=plan.synthetic[0] if plan.proxies else None,
        trainings={name: stages.train for name, stages in plan.variants.items()},
        certifications={name: stages.certify for name, stages in plan.variants.items()},
    )


def compare_variants(plan: Plan) -> dict[str, Comparison | Incomparable]:
    """Mixed against real-only on the same images, as far as the attacks went; empty where there is only one variant."""
    if "mixed" not in plan.variants:
        return {}
    mixed, real = plan.variants["mixed"], plan.variants["real-only"]
    confidence = plan.config.gate.confidence
    return {
        **compare_where_possible(read_verdicts(mixed.evaluate), read_verdicts(real.evaluate), confidence=confidence),
        **compare_certificates(
            read_certificates(mixed.certify),
            read_certificates(real.certify),
            plan.config.certify.radii,
            plan.config.certify.linf,
            confidence=confidence,
        ),
    }


@task(name="register and promote", task_run_name="register and promote", persist_result=False)
def release(plan: Plan, tracker: Tracker, run_id: str) -> Registration:
    """Register the exported model and promote it if the gate says PASS."""
    registration = register_model(plan, tracker, run_id)
    if registration.change is not None:
        announce_change(registration.name, registration.version, registration.change, registration.decision.reason)
    return registration


def announce_change(name: str, version: int, change: ChangeName, reason: str) -> None:
    """Tell Prefect that a version became champion, or ceased to be: an event that automations can act on."""
    emit_event(
        f"{CHAMPION_EVENT}.{change}",
        resource={"prefect.resource.id": f"proxyrob.model.{name}", "prefect.resource.name": name},
        payload={"version": version, "reason": reason},
    )
