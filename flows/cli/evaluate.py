"""The command that attacks a model: one of a run, or anybody's."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.console import (
    AsOption,
    ImagesOption,
    ModelArgument,
    ModelOption,
    OutputOption,
    PathOption,
    SourceOption,
    SubsetSeedOption,
    TrackOption,
    console,
    failures,
    prepare_settings,
    require_choice,
    work_in_child,
    wrong_use,
)

if TYPE_CHECKING:
    from flows.measure.subject import Subject
    from proxyrob.config import BlackBoxConfig, EvaluateConfig

MODES = ("standard", "gate")


def evaluate(
    model: ModelArgument,
    variant: ModelOption = None,
    published_as: AsOption = None,
    source: SourceOption = None,
    path: PathOption = None,
    images: ImagesOption = None,
    subset_seed: SubsetSeedOption = None,
    threat: Annotated[
        str | None, typer.Option(help="Norm and epsilon, in pixel units of [0,1]: `linf:8/255`, `l2:0.5`. Default: the run's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the attacks. Default: the run's own, else 0.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="`standard`, or `gate`: a faster search that is no AutoAttack. Default: the run's own.")
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="With mode `gate`: stop when this robust accuracy is sure to be reached, or missed.")
    ] = None,
    output: OutputOption = None,
    track: TrackOption = False,
) -> None:
    """Attack a model with AutoAttack and PGD, check whether the figures mean anything, and write table, card and figure.

    Any model will do that takes images [n, c, h, w] in [0,1] and returns logits: normalisation is part of it. An ONNX file
    gives no gradients and is attacked with Square alone, which is not AutoAttack.

    Give the same command on other processors or machines that share the store, and they share the work.
    """
    settings = prepare_settings()
    from flows.measure.images import find_images
    from flows.measure.measurements import (
        describe_evaluation,
        prepare_folder,
        print_measurement,
        track_measurement,
        write_outcome,
    )
    from flows.measure.subject import find_subject
    from flows.plan import evaluate_stage, sanity_stage
    from proxyrob.evaluate import check_sanity, evaluate_black_box, evaluate_classifier, require_fit
    from proxyrob.threat import parse_threat

    with failures(), wrong_use():
        require_choice("--mode", mode, MODES)
        asked = None if threat is None else parse_threat(threat)
        subject = find_subject(model, settings, variant=variant, published_as=published_as)
        chosen = asked or subject.threat
        if chosen is None:
            raise ValueError(f"{subject.title} does not say against what to measure it; say it, e.g. --threat linf:8/255")
        config = _configure(subject, mode, target)
        data = find_images(subject, settings, source=source, path=path, count=images, subset_seed=subset_seed)
        chosen_seed = subject.seed if seed is None else seed
        stage = evaluate_stage(config, data, subject.model, chosen, chosen_seed, settings.store)
        folder = prepare_folder(output, subject, stage, settings)
    given: dict[str, Any] = {"source": data, "model": subject.model}
    if subject.is_foreign and not stage.is_whole():
        work_in_child(require_fit, "does the model fit", reference=subject.title, **given)
    attack = evaluate_classifier if subject.has_gradients else evaluate_black_box
    report = work_in_child(attack, "attack", stage=stage, config=config, threat=chosen, seed=chosen_seed, **given)
    sanity = work_in_child(
        check_sanity,
        "sanity checks",
        stage=sanity_stage(data, subject.model, stage, subject.labels, subject.twin, chosen_seed, settings.store),
        evaluation=stage,
        twin=subject.twin,
        labels=subject.labels,
        seed=chosen_seed,
        **given,
    )
    with failures():
        measurement = describe_evaluation(subject, data, stage, chosen, report, sanity)
        files = write_outcome(folder, stage, measurement)
        remark = None
        if (reached := getattr(report, "target_reached", None)) is not None:
            remark = f"target {'reached' if reached else 'missed'}; images that were not attacked to the end count as standing"
        print_measurement(f"{subject.title} · {chosen.label} · attack seed {chosen_seed}", measurement, folder, remark)
        if track:
            run_id = track_measurement(settings, stage, measurement, report, config, files)
            console.print(f"[green]✔[/] MLflow run {run_id} in the experiment «measurements»", soft_wrap=True)


def _configure(subject: "Subject", mode: str | None, target: float | None) -> "EvaluateConfig | BlackBoxConfig":
    from proxyrob.config import BlackBoxConfig

    if not subject.has_gradients:
        if mode is not None or target is not None:
            raise ValueError(f"{subject.note} Leave out --mode and --target: there is but one search")
        return BlackBoxConfig()
    config = subject.evaluate
    return config.replace(mode=mode or config.mode, target=config.target if target is None else target)
