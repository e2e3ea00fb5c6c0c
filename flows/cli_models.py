"""Commands that measure or export a model of a finished run again."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from flows.plan import Plan, Variant
    from proxyrob.compare import Sandwich
    from proxyrob.config import CertifyConfig
    from proxyrob.storage import Stage
    from proxyrob.threat import Threat


def evaluate(
    run_name: RunArgument,
    model: ModelOption = None,
    threat: Annotated[str | None, typer.Option(help="Another threat model, e.g. `linf:0.1`. Default: the run's own.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed of the attacks. Default: the run's own.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="`standard`, or `gate`: a faster search that is no AutoAttack. Default: the run's own.")
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="With mode `gate`: stop when this robust accuracy is sure to be reached, or missed.")
    ] = None,
) -> None:
    """Attack a model of a run again, with AutoAttack and PGD on the whole test split.

    Give the same command on other processors or machines that share the store, and they share the work.
    """
    from proxyrob.threat import parse_threat

    with wrong_use():
        plan = plan_of(find_run(run_name))
        variant = choose_variant(plan, model)
        chosen = parse_threat(threat) if threat else plan.config.threat
        config = plan.config.evaluate
        config = config.replace(mode=mode or config.mode, target=config.target if target is None else target)
    from flows.plan import evaluate_stage
    from proxyrob.evaluate import evaluate_classifier

    chosen_seed = plan.config.seed if seed is None else seed
    trained = plan.variants[variant].train
    stage = evaluate_stage(config, plan.source, trained, chosen, chosen_seed, plan.store)
    report = work_in_child(
        evaluate_classifier,
        f"attack-{variant}",
        stage=stage,
        config=config,
        source=plan.source,
        model=trained,
        threat=chosen,
        seed=chosen_seed,
    )
    _print_figures(
        f"{run_name} · {variant} · {chosen.label} · attack seed {chosen_seed} · {report.clean.n} images",
        {"clean": report.clean, f"PGD-{config.pgd_steps}": report.pgd, report.ensemble: report.autoattack},
    )
    if report.target_reached is not None:
        console.print(f"  target {100 * (config.target or 0.0):g} % {'reached' if report.target_reached else 'missed'}")
    console.print(f"[dim]{stage.folder}[/]", soft_wrap=True)


def replay(
    run_name: RunArgument,
    on: Annotated[str | None, typer.Option(help="The run whose model they are shown to. Default: the same run.")] = None,
    model: ModelOption = None,
    on_model: Annotated[
        str | None, typer.Option("--on-model", help="Which model of that run. Default: the released one.")
    ] = None,
) -> None:
    """Show the adversarial images that were found for a model of one run to a model of another: seconds, no new attack."""
    with wrong_use():
        plan = plan_of(find_run(run_name))
        variant = choose_variant(plan, model)
        other = plan_of(find_run(on or run_name))
        other_variant = choose_variant(other, on_model)
    from proxyrob.evaluate import replay_classifier

    report = work_in_child(
        replay_classifier,
        f"replay-{other_variant}",
        source=other.source,
        evaluation=plan.variants[variant].evaluate,
        model=other.variants[other_variant].train,
    )
    _print_figures(
        f"found for {run_name} · {variant}, shown to {on or run_name} · {other_variant} · {plan.config.threat.label}",
        {
            "clean": report.clean,
            "of the adversarial images misclassified": report.fooled,
            "robust accuracy at most": report.upper_bound,
        },
    )


def certify(
    run_name: RunArgument,
    model: ModelOption = None,
    images: Annotated[int | None, typer.Option(min=2, help="The first n test images. Default: the run's own.")] = None,
    samples: Annotated[
        int | None, typer.Option("--n", min=1, help="Samples per image, or the most. Default: the run's.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="`fixed`: n samples each. `sequential`: until the answer is known. Default: the run's own."),
    ] = None,
    radius: Annotated[
        list[float] | None, typer.Option(help="An L2 radius to report, e.g. `0.25`. May be repeated. Default: the run's own.")
    ] = None,
    linf: Annotated[
        list[str] | None, typer.Option(help="An L∞ threshold to report, e.g. `2/255`. May be repeated. Default: the run's own.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="`float32` or `bfloat16`. Default: the run's own.")] = None,
    tsv: Annotated[Path | None, typer.Option(help="Also write the table as locuslab/smoothing does, to this file.")] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="Also attack the smoothed classifier, e.g. within `l2:0.5`, and join the two. May be repeated."),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw certified and attacked accuracy over the radius, as PNG.")] = None,
) -> None:
    """Certify the smoothed classifier of a run again: on more images, with more samples, or stopping when all is known.

    With --attack the same smoothed classifier is attacked, too. Its accuracy lies between the certified and the attacked one;
    an image at which the two contradict each other is an alarm.
    """
    from proxyrob.threat import parse_threat

    with wrong_use():
        plan = plan_of(find_run(run_name))
        variant = choose_variant(plan, model)
        config = plan.config.certify
        config = config.replace(
            num_images=images or config.num_images,
            n=samples or config.n,
            radii=tuple(radius) if radius else config.radii,
            linf=config.linf if linf is None else tuple(linf),
            precision=precision or config.precision,
            method=config.method if method in {None, config.method.kind} else {"kind": method},
        )
        plan.config.replace(certify=config)  # refuses more images than there are, and radii beyond the cap
        threats = [parse_threat(text) for text in attack or ()]
    from flows.plan import certify_stage
    from proxyrob.certify import certify_classifier, read_certificates, to_smoothing_tsv
    from proxyrob.storage.files import require_writable, write_bytes

    with failures():
        for file in (tsv, picture):
            if file is not None:
                require_writable(file.absolute().parent)
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
    with failures():
        table, header = read_certificates(stage)
        if tsv is not None:
            write_bytes(tsv.absolute(), to_smoothing_tsv(table).encode())
    title = f"{run_name} · {variant} · {header.conditions}, α = {config.alpha:g} · {config.num_images} images"
    figures = {f"certified at L2 radius {radius}": share for radius, share in report.certified.items()}
    figures |= {f"certified at L∞ {threshold}": share for threshold, share in report.certified_linf.items()}
    _print_figures(title, {**figures, "abstained": report.abstained})
    mean = report.average_certified_radius
    console.print(f"  average certified radius {mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]")
    console.print(
        f"  [dim]at most {report.expected_false_certificates:g} of {config.num_images} certificates are expected not to hold; "
        f"{report.samples_per_image:,.0f} samples per image[/]\n[dim]{stage.folder}[/]",
        soft_wrap=True,
    )
    sandwiches = [_attack_certified(plan, variant, config, stage, threat) for threat in threats]
    if picture is not None:
        from proxyrob.figures.pictures import draw_certified_curves

        points = [
            (threat.enclosing_l2_radius(header.num_values), sandwich.attacked.value)
            for threat, sandwich in zip(threats, sandwiches, strict=True)
        ]
        draw_certified_curves(
            picture.absolute(),
            {variant: table},
            sigma=sigma,
            conditions=header.conditions,
            attacked={variant: points} if points else None,
        )
    for file in (tsv, picture):
        if file is not None:
            console.print(f"[green]✔[/] {file}", soft_wrap=True)


def _attack_certified(
    plan: "Plan", variant: "Variant", config: "CertifyConfig", certification: "Stage", threat: "Threat"
) -> "Sandwich":
    """Attack the smoothed classifier that was certified, and say where certificates and attack contradict each other."""
    from flows.plan import smooth_attack_stage
    from proxyrob.certify import attack_smoothed_classifier, read_attacks, read_certificates
    from proxyrob.compare import check_sandwich
    from proxyrob.config import SmoothAttackConfig

    sigma, smooth, seed = plan.config.smooth.objective.sigma, plan.variants[variant].smooth, plan.config.seed
    attack = SmoothAttackConfig(num_images=config.num_images, precision=config.precision)
    stage = smooth_attack_stage(attack, plan.source, smooth, sigma, threat, seed, plan.store)
    work_in_child(
        attack_smoothed_classifier,
        f"attack-smoothed-{variant}",
        stage=stage,
        config=attack,
        sigma=sigma,
        threat=threat,
        source=plan.source,
        model=smooth,
        seed=seed,
    )
    with failures():
        found = check_sandwich(read_certificates(certification), read_attacks(stage))
    _print_figures(
        f"the smoothed classifier within {threat.label}",
        {"certified, so at least": found.certified, "attacked, so at most": found.attacked},
    )
    for one in found.contradictions:
        console.print(
            f"[red]contradiction[/] image {one.index}: certified up to {one.radius_l2:.3f}, so its class has at least "
            f"{one.promised:.3f} of the probability at distance {one.distance_l2:.3f}; found at most {one.found:.3f}",
            soft_wrap=True,
        )
    console.print(
        f"  {len(found.contradictions)} contradictions [dim](at most {found.expected_contradictions:g} expected by chance)[/]"
    )
    return found


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
    console.print(title, style="italic", highlight=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 2), show_header=False)
    for name, figure in figures.items():
        table.add_row(name, str(figure))
    console.print(table)
