"""The parts of the pipeline as flows of their own: what a part makes lies in the store, where the pipeline finds it.

A part does what it needs of the parts before it, as far as that is not done already. It records nothing in MLflow; the pipeline
that takes its results does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect import flow

from flows.assess import assess_attacks, assess_certificates
from flows.build_proxy import DataFutures, build_proxy
from flows.parameters import Changes, Preset, name_run
from flows.pipeline import RUNNER
from flows.plan import Plan, pin_config, plan_pipeline
from flows.running.stages import await_stages, current_session, open_worker_session
from flows.train_robust import require_shares, train_robust, train_smooth
from proxyrob.config import load_config


@flow(name="proxyrob-data", flow_run_name=name_run, task_runner=RUNNER, retries=0, persist_result=False)
def make_data(preset: Preset = "digits", changes: Changes = ()) -> dict[str, float]:
    """First part: real images, proxies, samples, labels. Returns the seconds of each stage."""
    with _planned(preset, changes) as plan:
        build_proxy(plan)
        return _conclude()


@flow(name="proxyrob-train", flow_run_name=name_run, task_runner=RUNNER, retries=0, persist_result=False)
def train_models(preset: Preset = "digits", changes: Changes = ()) -> dict[str, float]:
    """Second part: robust training and training for smoothing, of every variant. Returns the seconds of each stage."""
    with _planned(preset, changes) as plan:
        _train(plan, build_proxy(plan))
        return _conclude()


@flow(name="proxyrob-assess", flow_run_name=name_run, task_runner=RUNNER, retries=0, persist_result=False)
def assess_models(preset: Preset = "digits", changes: Changes = ()) -> dict[str, float]:
    """Third part: attacks, sanity checks and certificates, of every variant. Returns the seconds of each stage."""
    with _planned(preset, changes) as plan:
        built = build_proxy(plan)
        trained, smoothed = _train(plan, built)
        for variant in reversed(plan.variants):
            assess_attacks(plan, variant, built, trained)
            assess_certificates(plan, variant, [smoothed[variant]])
        return _conclude()


@contextmanager
def _planned(preset: str, changes: tuple[str, ...]) -> Iterator[Plan]:
    with open_worker_session() as session:
        settings = session.settings
        plan = plan_pipeline(pin_config(load_config(preset, changes), settings), settings.store, settings.place)
        require_shares(plan, settings.processes)
        yield plan


def _train(plan: Plan, built: DataFutures) -> tuple[dict, dict]:
    trained = {variant: train_robust(plan, variant, built) for variant in reversed(plan.variants)}
    return trained, {variant: train_smooth(plan, variant, built) for variant in reversed(plan.variants)}


def _conclude() -> dict[str, float]:
    await_stages()
    records = {label: submitted.stage.record() for label, submitted in current_session().submitted.items()}
    return {label: round(record.elapsed_s, 2) for label, record in records.items() if record is not None}
