"""Commands that show or export a model of a finished run."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from flows.console import (
    AsOption,
    ModelOption,
    RunArgument,
    choose_variant,
    console,
    failures,
    find_run,
    plan_of,
    prepare_settings,
    print_figures,
    work_in_child,
    wrong_use,
)


def replay(
    run_name: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, or the output folder of `proxyrob evaluate`: whose images are shown.")
    ],
    on: Annotated[
        str | None, typer.Option(help="The model they are shown to, named as for `evaluate`. Default: that of the same run.")
    ] = None,
    model: ModelOption = None,
    on_model: Annotated[
        str | None, typer.Option("--on-model", help="Which model of that run. Default: the released one.")
    ] = None,
    published_as: AsOption = None,
) -> None:
    """Show the adversarial images that were found for one model to another: seconds, no new attack, no gradients needed."""
    settings = prepare_settings()
    from flows.measure.measurements import find_evaluation
    from flows.measure.subject import find_subject
    from proxyrob.evaluate import replay_classifier

    with failures(), wrong_use():
        found = find_evaluation(run_name, model, settings)
        if on is None and not found.is_of_run:
            raise ValueError(f"say to which model the images that were found for {found.title} are to be shown: --on MODEL")
        shown = find_subject(on or run_name, settings, variant=on_model, published_as=published_as)
    report = work_in_child(replay_classifier, "replay", source=found.source, evaluation=found.evaluation, model=shown.model)
    print_figures(
        f"found for {found.title}, shown to {shown.title}",
        {
            "clean": report.clean,
            "of the adversarial images misclassified": report.fooled,
            "robust accuracy at most": report.upper_bound,
        },
    )


def export(
    run_name: RunArgument,
    to: Annotated[Path, typer.Option("--to", help="Folder for model.onnx, card.md and card.json.")],
    model: ModelOption = None,
) -> None:
    """Export a model of a run to ONNX, prove that it equals the trained model, and write its card."""
    with wrong_use():
        plan = plan_of(find_run(run_name))
        variant = choose_variant(plan, model)
    from flows.describe import describe_data, describe_training
    from flows.plan import export_stage, model_name
    from proxyrob.export import CARD, CARD_JSON, MODEL, export_classifier
    from proxyrob.storage.files import require_writable

    with failures():
        require_writable(to.absolute())
    stages = plan.variants[variant]
    stage = export_stage(plan.config, plan.source, stages.train, stages.evaluate, plan.store)
    report = work_in_child(
        export_classifier,
        "export",
        stage=stage,
        name=model_name(plan.config),
        training=describe_training(plan.config, variant),
        training_data=describe_data(plan.config, variant),
        source=plan.source,
        model=stages.train,
        evaluation=stages.evaluate,
        seed=plan.config.seed,
        on_device=False,
    )
    for name in (MODEL, CARD, CARD_JSON):
        shutil.copyfile(stage.verified(name), to / name)
    console.print(f"[green]✔[/] {to / MODEL} ({report.size_bytes:,} bytes); {report.parity.describe()}")
