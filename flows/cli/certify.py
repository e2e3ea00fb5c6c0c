"""The command that certifies a smoothed classifier: of a run, or of anybody's network."""

from pathlib import Path
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
    print_figures,
    require_choice,
    work_in_child,
    wrong_use,
)

if TYPE_CHECKING:
    from flows.measure.subject import Subject
    from proxyrob.compare import Sandwich
    from proxyrob.config import CertifyConfig
    from proxyrob.source import SourceReport
    from proxyrob.storage import Stage
    from proxyrob.threat import Threat

METHODS, PRECISIONS = ("fixed", "sequential"), ("float32", "bfloat16")


def certify(
    model: ModelArgument,
    variant: ModelOption = None,
    published_as: AsOption = None,
    source: SourceOption = None,
    path: PathOption = None,
    images: ImagesOption = None,
    subset_seed: SubsetSeedOption = None,
    sigma: Annotated[
        float | None, typer.Option(help="Standard deviation of the noise, in pixel units. Default: that of the training.")
    ] = None,
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
    output: OutputOption = None,
    track: TrackOption = False,
) -> None:
    """Certify a smoothed classifier: on more images, with more samples, or stopping when all is known.

    Of a run that is the model it trained for smoothing; of any other network the classifier that --sigma makes of it. With
    --attack the same smoothed classifier is attacked, too. Its accuracy lies between the certified and the attacked one; an
    image at which the two contradict each other is an alarm.
    """
    settings = prepare_settings()
    from flows.measure.images import find_images
    from flows.measure.measurements import (
        describe_certification,
        prepare_folder,
        print_measurement,
        track_measurement,
        write_outcome,
    )
    from flows.measure.subject import find_subject
    from flows.plan import certify_stage
    from proxyrob.certify import certify_classifier, read_certificates, to_smoothing_tsv
    from proxyrob.evaluate import require_fit
    from proxyrob.figures.pictures import draw_certified_curves
    from proxyrob.source import source_report
    from proxyrob.storage.files import require_writable, write_bytes
    from proxyrob.threat import parse_threat

    with failures(), wrong_use():
        require_choice("--method", method, METHODS)
        require_choice("--precision", precision, PRECISIONS)
        threats = [parse_threat(text) for text in attack or ()]
        subject = find_subject(model, settings, variant=variant, published_as=published_as, smoothed=True)
        noise = _choose_sigma(subject, sigma)
        # of a run's own images the first n are certified anyway, and its certificates of fewer are found again
        drawn = None if subset_seed is None and source is None else images
        data = find_images(subject, settings, source=source, path=path, count=drawn, subset_seed=subset_seed)
        config, there = subject.certify, source_report(data)
        config = config.replace(
            num_images=images or min(config.num_images, there.num_test),
            n=samples or config.n,
            radii=tuple(radius) if radius else config.radii,
            linf=config.linf if linf is None else tuple(linf),
            precision=precision or config.precision,
            method=config.method if method in {None, config.method.kind} else {"kind": method},
        )
        _require_possible(config, noise, there)
        stage = certify_stage(config, data, subject.model, noise, subject.seed, settings.store)
        folder = prepare_folder(output, subject, stage, settings)
        for file in (tsv, picture):
            if file is not None:
                require_writable(file.absolute().parent)
    given: dict[str, Any] = {"source": data, "model": subject.model}
    if subject.is_foreign and not stage.is_whole():
        work_in_child(require_fit, "does the model fit", reference=subject.title, **given)
    report = work_in_child(certify_classifier, "certify", stage=stage, config=config, sigma=noise, seed=subject.seed, **given)
    with failures():
        table, header = read_certificates(stage)
        if tsv is not None:
            write_bytes(tsv.absolute(), to_smoothing_tsv(table).encode())
        measurement = describe_certification(subject, data, stage, report)
        files = write_outcome(folder, stage, measurement)
        remark = (
            f"at most {report.expected_false_certificates:g} of {config.num_images} certificates are expected not to hold; "
            f"{report.samples_per_image:,.0f} samples per image"
        )
        print_measurement(f"{subject.title} · {header.conditions}, α = {config.alpha:g}", measurement, folder, remark)
    points: list[tuple[float, float]] = []
    for threat in threats:
        found = _attack_certified(subject, data, noise, config, stage, threat, settings.store)
        points.append((threat.enclosing_l2_radius(header.num_values), found.attacked.value))
    if picture is not None:
        draw_certified_curves(
            picture.absolute(),
            {subject.title: table},
            sigma=noise,
            conditions=header.conditions,
            attacked={subject.title: points} if points else None,
        )
    for file in (tsv, picture):
        if file is not None:
            console.print(f"[green]✔[/] {file}", soft_wrap=True)
    if track:
        with failures():
            run_id = track_measurement(settings, stage, measurement, report, config, files)
        console.print(f"[green]✔[/] MLflow run {run_id} in the experiment «measurements»", soft_wrap=True)


def _require_possible(config: "CertifyConfig", sigma: float, there: "SourceReport") -> None:
    """Raise ``ValueError`` when there are fewer images than asked for, or radii that no image can reach."""
    if config.num_images > there.num_test:
        raise ValueError(f"--images: expected at most {there.num_test}, the number of test images, got {config.num_images}")
    channels, height, width = there.image_shape
    config.require_reachable(sigma, channels * height * width)


def _choose_sigma(subject: "Subject", sigma: float | None) -> float:
    """The noise to certify at. Raises ``ValueError`` when it is not known, or another than the network was trained with."""
    if not subject.has_gradients:
        raise ValueError(f"{subject.note} Certify the network that the file was exported from")
    chosen = subject.sigma if sigma is None else sigma
    if chosen is None:
        raise ValueError(f"{subject.title} does not say for which noise it was trained; say it, e.g. --sigma 0.25")
    if chosen <= 0.0:
        raise ValueError(f"--sigma: expected a positive number, in pixel units of [0,1], got {chosen:g}")
    if subject.sigma not in {None, chosen}:
        raise ValueError(
            f"--sigma {chosen:g}: {subject.title} was trained for σ = {subject.sigma:g}; leave the option out, or give a model "
            f"that was trained for {chosen:g}"
        )
    return chosen


def _attack_certified(
    subject: "Subject",
    data: "Stage",
    sigma: float,
    config: "CertifyConfig",
    certification: "Stage",
    threat: "Threat",
    store: Path,
) -> "Sandwich":
    """Attack the smoothed classifier that was certified, and say where certificates and attack contradict each other."""
    from flows.plan import smooth_attack_stage
    from proxyrob.certify import attack_smoothed_classifier, read_attacks, read_certificates
    from proxyrob.compare import check_sandwich
    from proxyrob.config import SmoothAttackConfig

    attack = SmoothAttackConfig(num_images=config.num_images, precision=config.precision)
    stage = smooth_attack_stage(attack, data, subject.model, sigma, threat, subject.seed, store)
    work_in_child(
        attack_smoothed_classifier,
        "attack the smoothed classifier",
        stage=stage,
        config=attack,
        sigma=sigma,
        threat=threat,
        source=data,
        model=subject.model,
        seed=subject.seed,
    )
    with failures():
        found = check_sandwich(read_certificates(certification), read_attacks(stage))
    print_figures(
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
