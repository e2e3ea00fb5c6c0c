"""Commands that measure or export a model of a finished run again."""

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.console import (
    ModelOption,
    RunArgument,
    choose_variant,
    console,
    failures,
    find_run,
    plan_of,
    work_in_child,
    wrong_use,
)


def evaluate(
    run_name: RunArgument,
    model: ModelOption = None,
    threat: Annotated[str | None, typer.Option(help="Another threat model, e.g. `linf:0.1`. Default: the run's own.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed of the attacks. Default: the run's own.")] = None,
) -> None:
    """Attack a model of a run again, with AutoAttack standard and PGD on the whole test split."""
    from proxyrob.threat import parse_threat

    with wrong_use():
        plan = plan_of(find_run(run_name))
        variant = choose_variant(plan, model)
        chosen = parse_threat(threat) if threat else plan.config.threat
    from flows.plan import evaluate_stage
    from proxyrob.evaluate import evaluate_classifier

    chosen_seed = plan.config.seed if seed is None else seed
    trained = plan.variants[variant].train
    stage = evaluate_stage(plan.config.evaluate, plan.source, trained, chosen, chosen_seed, plan.store)
    report = work_in_child(
        evaluate_classifier,
        f"attack-{variant}",
        stage=stage,
        config=plan.config.evaluate,
        source=plan.source,
        model=trained,
        threat=chosen,
        seed=chosen_seed,
    )
    _print_figures(
        f"{run_name} · {variant} · {chosen.label} · attack seed {chosen_seed} · {report.clean.n} images",
        {"clean": report.clean, f"PGD-{plan.config.evaluate.pgd_steps}": report.pgd, "AutoAttack standard": report.autoattack},
    )
    console.print(f"[dim]{stage.folder}[/]", soft_wrap=True)


def certify(
    run_name: RunArgument,
    model: ModelOption = None,
    images: Annotated[int | None, typer.Option(min=2, help="The first n test images. Default: the run's own.")] = None,
    samples: Annotated[int | None, typer.Option("--n", min=1, help="Samples per image. Default: the run's own.")] = None,
) -> None:
    """Certify the smoothed classifier of a run again, on more images or with more samples."""
    with wrong_use():
        plan = plan_of(find_run(run_name))
        variant = choose_variant(plan, model)
        config = plan.config.certify
        config = config.replace(num_images=images or config.num_images, n=samples or config.n)
        plan.config.replace(certify=config)  # refuses more images than there are, and radii beyond the cap
    from flows.plan import certify_stage
    from proxyrob.certify import certify_classifier

    sigma, smooth = plan.config.smooth.objective.sigma, plan.variants[variant].smooth
    stage = certify_stage(config, plan.source, smooth, sigma, plan.config.seed, plan.store)
    report = work_in_child(
        certify_classifier,
        f"certify-{variant}",
        stage=stage,
        config=config,
        sigma=sigma,
        source=plan.source,
        model=smooth,
        seed=plan.config.seed,
    )
    title = f"{run_name} · {variant} · σ = {sigma:g}, n = {config.n:,}, α = {config.alpha:g} · {config.num_images} images"
    _print_figures(title, {f"certified at L2 radius {radius}": share for radius, share in report.certified.items()})
    radius = report.average_certified_radius
    console.print(f"  average certified radius {radius.value:.3f} [{radius.low:.3f}, {radius.high:.3f}]")
    console.print(
        f"  [dim]at most {report.expected_false_certificates:g} false certificates expected[/]\n[dim]{stage.folder}[/]",
        soft_wrap=True,
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
    from flows.plan import describe_data, describe_training, export_stage, model_name
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


def _print_figures(title: str, figures: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2), show_header=False, title=title, title_justify="left")
    for name, figure in figures.items():
        table.add_row(name, str(figure))
    console.print(table)
