"""The champion is attacked again, with other seeds and a larger budget; it stays champion only if its figure holds."""

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from pydantic import Field

from flows.pipeline import RUNNER
from flows.plan import Plan, evaluate_stage, plan_pipeline
from flows.records.registry import Champion, find_registered_champion, judge_champion
from flows.records.tracking import Tracker
from flows.release import announce_change
from flows.running.stages import await_stages, current_session, open_worker_session, submit_stage
from flows.settings import CONFIGURATION
from proxyrob.compare import Comparison, compare_attacked_again
from proxyrob.config import load_config
from proxyrob.evaluate import evaluate_classifier, read_verdicts
from proxyrob.source import SourceReport
from proxyrob.storage import Stage
from proxyrob.train import TrainReport

SEEDS_A_DAY = 100

Model = Annotated[
    str, Field(title="Registered model", description="Data set and norm.", min_length=1, examples=["digits-linf", "digits-l2"])
]
Restarts = Annotated[
    int,
    Field(
        title="AutoAttack runs", description="Each with a seed of its own; an image counts if it withstands all.", ge=1, le=20
    ),
]
PgdSteps = Annotated[int, Field(title="Steps of PGD", description="An image has to withstand these, too.", ge=1, le=10_000)]
Seed = Annotated[
    int | None,
    Field(
        title="Seed", description="Of the first AutoAttack run. Empty: follows from the day, so that every night has its own."
    ),
]


def _name_run() -> str:
    return f"{flow_run.parameters.get('model', '')} champion"


@flow(name="proxyrob-nightly", flow_run_name=_name_run, task_runner=RUNNER, retries=0, persist_result=False)
def reevaluate_champion(
    model: Model = "digits-linf", restarts: Restarts = 2, pgd_steps: PgdSteps = 100, seed: Seed = None
) -> dict[str, Any]:
    """Attack the champion of a registered model again and take the alias back if its robust accuracy fell by more than the
    gate's margin allows, by a paired test on the same images. Returns what was found.

    The training must lie in the store of the worker that does it. Raises ``ValueError`` where it does not.
    """
    with open_worker_session() as session:
        tracker = Tracker(session.settings)
        champion = find_registered_champion(tracker, model)
        if champion is None:
            return {"model": model, "verdict": "there is no champion"}
        plan = _plan_of(champion, tracker)
        first = seed if seed is not None else SEEDS_A_DAY * flow_run.scheduled_start_time.astimezone(UTC).toordinal()
        stages = [_attack(plan, first + k, pgd_steps) for k in range(restarts)]
        await_stages()
        return judge(tracker, champion, plan, stages, first, f"{restarts} × AutoAttack, PGD-{pgd_steps}")


@task(name="judge the champion", task_run_name="judge the champion", persist_result=False)
def judge(tracker: Tracker, champion: Champion, plan: Plan, stages: list[Stage], seed: int, budget: str) -> dict[str, Any]:
    """Compare with what the champion was registered with, record it on the version, and act on it."""
    gate = plan.config.gate
    found = compare_attacked_again(
        champion.verdicts, [read_verdicts(stage) for stage in stages], margin=gate.margin, confidence=gate.confidence
    )
    reason = describe_reevaluation(found, seed, budget)
    withdrawn = judge_champion(tracker, champion, found, reason)
    if withdrawn:
        announce_change(champion.name, champion.version, "withdrawn", reason)
    title = f"**{champion.name} version {champion.version}**: {'no longer champion' if withdrawn else 'stays champion'}"
    create_markdown_artifact(key="champion", markdown=f"{title}\n\n{reason}", description=datetime.now(UTC).date().isoformat())
    return {
        "model": champion.name,
        "version": champion.version,
        "verdict": found.verdict,
        "withdrawn": withdrawn,
        "reason": reason,
    }


def describe_reevaluation(found: Comparison, seed: int, budget: str) -> str:
    """In words: what the repeated attack found, and what that means."""
    low, high, margin = 100 * found.low, 100 * found.high, 100 * found.margin
    meaning = {
        "PASS": "it holds",
        "FAIL": "it has fallen by more than is allowed",
        "UNDECIDED": "whether it has fallen by more than is allowed is not sure",
    }[found.verdict]
    return (
        f"attacked again ({budget}, seed {seed}): robust accuracy {100 * found.difference:+.1f} points, "
        f"{100 * found.confidence:g} % interval [{low:+.1f}, {high:+.1f}] on {found.n} images, at most {margin:g} may be lost: "
        f"{meaning}"
    )


def _plan_of(champion: Champion, tracker: Tracker) -> Plan:
    """The plan that made the champion, from the configuration that its run was recorded with."""
    settings = current_session().settings
    with tempfile.TemporaryDirectory() as folder:
        path = tracker.download(champion.parent_run, CONFIGURATION, Path(folder))
        plan = plan_pipeline(load_config(str(path)), settings.store, settings.place)
    variant = plan.variants[plan.released]
    if plan.source.finished(SourceReport) is None or variant.train.finished(TrainReport) is None:
        raise ValueError(
            f"the training of {champion.name} version {champion.version} is not below {settings.store}: let a worker do it "
            "that has the PROXYROB_HOME where it was trained, or train it there again with the configuration of its run"
        )
    return plan


def _attack(plan: Plan, seed: int, pgd_steps: int) -> Stage:
    config = plan.config.evaluate.replace(mode="standard", target=None, pgd_steps=pgd_steps)
    trained = plan.variants[plan.released].train
    stage = evaluate_stage(config, plan.source, trained, plan.config.threat, seed, plan.store)
    submit_stage(
        evaluate_classifier,
        stage,
        f"attack-again-{seed}",
        sharded=True,
        config=config,
        source=plan.source,
        model=trained,
        threat=plan.config.threat,
        seed=seed,
        device=current_session().device,
    )
    return stage
