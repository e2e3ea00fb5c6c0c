"""The whole path of one image, as one flow: the project's table of contents."""

from contextlib import ExitStack
from typing import Any, cast

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.assess import assess_attacks, assess_certificates
from flows.build_proxy import build_proxy
from flows.outcome import Outcome
from flows.parameters import Changes, Output, Preset, WeeklySeed, name_run, week_of
from flows.plan import pin_config, plan_pipeline
from flows.records.curves import ROBUST_CURVE, SMOOTH_CURVE
from flows.release import compare_variants, draw_pictures, export_released, release
from flows.running.stages import await_stages, open_worker_session
from flows.train_robust import require_shares, train_robust, train_smooth
from proxyrob.config import load_config

# A cast, because Prefect's TaskRunner is invariant in its future: its own thread pool does not fit flow's annotation.
RUNNER = cast(TaskRunner[PrefectFuture[Any]], ThreadPoolTaskRunner(max_workers=64))


@flow(name="proxyrob", flow_run_name=name_run, task_runner=RUNNER, retries=0, persist_result=False)
def run_pipeline(
    preset: Preset = "digits", changes: Changes = (), output: Output = None, weekly_seed: WeeklySeed = False
) -> dict[str, Any]:
    """From real images to a registered, exported robust model.

    ``preset`` is a preset's name or a YAML file, ``changes`` are ``key.path=value``, ``output`` is the folder of
    ``report.json`` and the pictures, ``weekly_seed`` takes the calendar week as seed. Stages that were done before are not
    done again. Returns the report.
    """
    if weekly_seed:
        changes = (*changes, f"seed={week_of(flow_run.scheduled_start_time)}")
    with ExitStack() as stack:
        settings = stack.enter_context(open_worker_session()).settings
        config = pin_config(load_config(preset, changes), settings)
        plan = plan_pipeline(config, settings.store, settings.place)
        require_shares(plan, settings.processes)
        outcome = stack.enter_context(Outcome(plan, changes, output))
        built = build_proxy(plan)
        trained, certified = {}, {}
        for variant in reversed(plan.variants):  # the mixed one first: what follows from it takes longest
            trained[variant] = train_robust(plan, variant, built, outcome.curve(variant, ROBUST_CURVE))
        attacked = {variant: assess_attacks(plan, variant, built, trained) for variant in trained}
        exported = export_released(plan, [attacked[plan.released].evaluation])
        for variant in reversed(plan.variants):
            smoothed = train_smooth(plan, variant, built, outcome.curve(variant, SMOOTH_CURVE))
            certified[variant] = assess_certificates(plan, variant, [smoothed])
        draw_pictures(plan, [exported, *certified.values(), *(futures.sanity for futures in attacked.values())])
        await_stages()
        run_id = outcome.record_models()
        registration = release(plan, outcome.tracker, run_id)
        return outcome.conclude(compare_variants(plan), registration)
