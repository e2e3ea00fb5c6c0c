"""The command line. Modules that take seconds to import are imported by the commands that need them."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from flows.plan import Plan, Variant

app = typer.Typer(
    name="proxyrob",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Image classifiers that withstand adversarial attack, trained on real images together with samples of a
generative model; every run is tracked in MLflow, every stage is a Prefect task.

Start with `proxyrob run digits`: three minutes on a laptop, nothing to set up.""",
)
console = Console()
errors = Console(stderr=True)

WRONG_USE, FAILED, INTERRUPTED = 2, 1, 130

RunArgument = Annotated[str, typer.Argument(help="A run: its output folder, its name, or the beginning of its name.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="`real-only` or `mixed`; without it the released one.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. `--set train.gamma=0.4`. May be repeated."),
]


@app.command()
def run(
    preset: Annotated[str, typer.Argument(help="A preset (see `proxyrob presets`) or the path of a YAML file.")] = "digits",
    changes: SetOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder for report.json, pictures, model and tables.")] = None,
) -> None:
    """Run the whole path: from real images to a registered, exported robust model.

    Stages whose configuration and inputs have not changed are taken from the store. A run that was killed goes on where
    it was: give the same command again.
    """
    from proxyrob.config import load_config

    changed = tuple(changes or ())
    with _wrong_use():
        load_config(preset, changed)
    settings = _prepare()

    from flows.embedded_api import await_api, start_api

    with _failures():
        server = start_api()
        from flows.workers import warm_up

        warm_up(settings.threads)
        with console.status("starting Prefect and loading torch …"):
            from flows.display import TerminalDisplay
            from flows.pipeline import run_pipeline
            from flows.stages import Session, open_session
            from proxyrob.device import resolve_device

            device = str(resolve_device(settings.device))
            if server is not None:
                await_api(server)
        _stop_children_on_signals()
        with TerminalDisplay(console) as display, open_session(Session(settings, device, display)) as session:
            report = run_pipeline(preset, changed, None if output is None else str(output.absolute()))
    folder = output.absolute() if output else settings.runs / report["run"]
    _print_report(report, folder, preset, everything_cached=len(report["cached"]) == len(session.submitted))


@app.command()
def presets(name: Annotated[str | None, typer.Argument(help="Show this preset's file.")] = None) -> None:
    """List the presets, or show one with all that its header says."""
    from proxyrob.config import preset_names, preset_text

    if name is not None:
        with _wrong_use():
            console.print(preset_text(name), end="", markup=False, highlight=False)
        return
    table = Table(box=None, padding=(0, 2), show_header=False)
    for known in preset_names():
        header = preset_text(known).splitlines()[0].removeprefix("#").strip()
        table.add_row(f"[bold]{known}[/]", escape(header))
    console.print(table)


@app.command()
def show(run_name: RunArgument) -> None:
    """Show the table of a finished run again."""
    from flows.report import read_report, render_report

    with _wrong_use():
        folder = _find_run(run_name)
        report = read_report(folder)
    console.print(render_report(report))
    console.print(f"\n[dim]{folder}[/]")


@app.command()
def compare(candidate: RunArgument, reference: RunArgument) -> None:
    """Compare the released models of two runs on the same images, image by image.

    McNemar's exact test and a paired interval. Results under different threat models, attacks or images are refused.
    """
    with _wrong_use():
        plans = [_plan_of(_find_run(name)) for name in (candidate, reference)]
    from proxyrob.compare import compare_verdicts
    from proxyrob.evaluate import read_verdicts

    with _failures():
        ours, theirs = (read_verdicts(plan.variants[plan.released].evaluate) for plan in plans)
        found = compare_verdicts(ours, theirs)
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for heading in ("", "difference", "95 % interval", "p", "verdict"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in found.items():
        interval = f"{100 * row.low:+.1f} to {100 * row.high:+.1f}"
        table.add_row(name, f"{100 * row.difference:+.1f} points", interval, f"{row.p_value:.2g}", row.verdict)
    console.print(f"{candidate} − {reference}, {found['clean'].n} images")
    console.print(table)
    console.print("[dim]PASS: the first is better by the paired test; FAIL: it is worse; UNDECIDED: neither is shown.[/]")


@app.command()
def evaluate(
    run_name: RunArgument,
    model: ModelOption = None,
    threat: Annotated[str | None, typer.Option(help="Another threat model, e.g. `linf:0.1`. Default: the run's own.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed of the attacks. Default: the run's own.")] = None,
) -> None:
    """Attack a model of a run again, with AutoAttack standard and PGD on the whole test split."""
    from proxyrob.threat import parse_threat

    with _wrong_use():
        plan = _plan_of(_find_run(run_name))
        variant = _variant(plan, model)
        chosen = parse_threat(threat) if threat else plan.config.threat
    from flows.plan import evaluate_stage
    from proxyrob.evaluate import evaluate_classifier

    chosen_seed = plan.config.seed if seed is None else seed
    trained = plan.variants[variant].train
    stage = evaluate_stage(plan.config.evaluate, plan.source, trained, chosen, chosen_seed, plan.store)
    report = _work(
        evaluate_classifier,
        stage,
        f"attack-{variant}",
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


@app.command()
def certify(
    run_name: RunArgument,
    model: ModelOption = None,
    images: Annotated[int | None, typer.Option(min=2, help="The first n test images. Default: the run's own.")] = None,
    samples: Annotated[int | None, typer.Option("--n", min=1, help="Samples per image. Default: the run's own.")] = None,
) -> None:
    """Certify the smoothed classifier of a run again, on more images or with more samples."""
    with _wrong_use():
        plan = _plan_of(_find_run(run_name))
        variant = _variant(plan, model)
        config = plan.config.certify
        config = config.replace(num_images=images or config.num_images, n=samples or config.n)
        plan.config.replace(certify=config)  # refuses more images than there are, and radii beyond the cap
    from flows.plan import certify_stage
    from proxyrob.certify import certify_classifier

    sigma, smooth = plan.config.smooth.objective.sigma, plan.variants[variant].smooth
    report = _work(
        certify_classifier,
        stage := certify_stage(config, plan.source, smooth, sigma, plan.config.seed, plan.store),
        f"certify-{variant}",
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


@app.command()
def export(
    run_name: RunArgument,
    to: Annotated[Path, typer.Option("--to", help="Folder for model.onnx, card.md and card.json.")],
    model: ModelOption = None,
) -> None:
    """Export a model of a run to ONNX, prove that it equals the trained model, and write its card."""
    with _wrong_use():
        plan = _plan_of(_find_run(run_name))
        variant = _variant(plan, model)
    from flows.plan import describe_data, describe_training, export_stage, model_name
    from proxyrob.export import CARD, CARD_JSON, MODEL, export_classifier
    from proxyrob.storage.files import require_writable

    with _failures():
        require_writable(to.absolute())
    stages = plan.variants[variant]
    stage = export_stage(plan.config, plan.source, stages.train, stages.evaluate, plan.store)
    report = _work(
        export_classifier,
        stage,
        "export",
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


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME[@ALIAS]", help="A registered model; without alias its champion.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for model.onnx, card.md and card.json.")],
) -> None:
    """Download a registered model with its card. onnxruntime alone is enough to use it."""
    settings = _prepare()
    from flows.registry import pull_model
    from flows.tracking import Tracker

    with _failures():
        path = pull_model(Tracker(settings).uri, name, to.absolute())
    console.print(f"[green]✔[/] {path}\n[dim]read {path.parent / 'card.md'} before relying on it[/]", soft_wrap=True)


@app.command()
def ui(port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000) -> None:
    """Open MLflow's pages on loopback: compare runs, look at curves and pictures, read model cards."""
    settings = _prepare()
    from flows.tracking import Tracker

    with _failures():
        Tracker(settings)
    address = f"http://127.0.0.1:{port}"
    console.print(f"MLflow is starting on [bold]{address}[/] (ready after some seconds; Ctrl-C ends it)")
    if settings.tracking_uri and settings.tracking_uri.startswith("http"):
        console.print(f"Your tracking server is {settings.tracking_uri}: open that instead.")
        return
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    arguments = ["--backend-store-uri", settings.resolved_tracking_uri, "--artifacts-destination", settings.artifacts.as_uri()]
    os.execv(
        sys.executable,
        [sys.executable, "-m", "mlflow", "server", *arguments, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
    )


def main() -> None:
    """The console script."""
    app()


def _prepare() -> Any:
    """Settings and environment, before Prefect or MLflow is imported."""
    from pydantic import ValidationError

    from flows.settings import Settings, prepare_environment

    try:
        settings = Settings()
    except ValidationError as error:
        fault = error.errors()[0]
        _fail(f"PROXYROB_{str(fault['loc'][0]).upper()}: {fault['msg']} (got {fault['input']!r})", WRONG_USE)
    try:
        prepare_environment(settings)
    except OSError as error:
        _fail(f"{error}\nResults lie below PROXYROB_HOME; set it to another folder.", WRONG_USE)
    return settings


def _work(function: Any, stage: Any, label: str, *, on_device: bool = True, **arguments: Any) -> Any:
    """One library function in a process of its own, with a progress bar, without Prefect."""
    settings = _prepare()
    from flows.display import TerminalDisplay
    from flows.workers import run_in_child, warm_up
    from proxyrob.device import resolve_device

    with _failures():
        if on_device:
            arguments["device"] = str(resolve_device(settings.device))
        warm_up(settings.threads)
        _stop_children_on_signals()
        with TerminalDisplay(console) as display:
            return run_in_child(
                function,
                threads=settings.threads,
                on_progress=lambda done, total, **figures: display.progress(label, done, total, **figures),
                stage=stage,
                **arguments,
            )


def _find_run(name: str) -> Path:
    """The output folder of a run, by path, name or the beginning of its name.

    Raises ``ValueError`` naming the runs there are.
    """
    from flows.settings import CONFIGURATION, Settings

    given = Path(name)
    if (given / CONFIGURATION).is_file():
        return given.absolute()
    runs = Settings().runs
    known = sorted(path for path in runs.glob("*") if (path / CONFIGURATION).is_file())
    found = [path for path in known if path.name == name] or [path for path in known if path.name.startswith(name)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(path.name for path in found or known) or "none yet"
    what = f"{name!r} may be any of these runs" if found else f"there is no run {name!r}; runs"
    raise ValueError(f"{what}: {listed} (in {runs})")


def _plan_of(folder: Path) -> "Plan":
    from flows.plan import plan_pipeline
    from flows.settings import CONFIGURATION, Settings
    from proxyrob.config import load_config

    return plan_pipeline(load_config(str(folder / CONFIGURATION)), Settings().store)


def _variant(plan: "Plan", model: str | None) -> "Variant":
    for variant in plan.variants:
        if variant == (model or plan.released):
            return variant
    raise ValueError(f"this run has no model {model!r}; it has {', '.join(plan.variants)}")


def _print_report(report: dict[str, Any], folder: Path, preset: str, *, everything_cached: bool) -> None:
    from flows.report import render_report

    console.print()
    console.print(render_report(report))
    if everything_cached:
        console.print("\nNothing was computed: every stage was done before (change a setting with --set, or the seed).")
    registered = report["registered"]
    change = "train.gamma=0.4" if report["proxy"] else "seed=1"
    alias = "champion" if "champion" in registered["aliases"] else "challenger"
    command = "proxyrob" if shutil.which("proxyrob") else os.path.relpath(sys.argv[0])
    console.print(
        f"\nReport, pictures, model and tables: {folder}"
        f"\n\n[bold]{command} ui[/]  [dim]compare runs in MLflow[/]"
        f"\n[bold]{command} pull {registered['name']}@{alias} --to my-model[/]  [dim]the model and its card[/]"
        f"\n[bold]{command} run {preset} --set {change}[/]  [dim]again, with one setting changed[/]",
        highlight=False,
        soft_wrap=True,
    )


def _print_figures(title: str, figures: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2), show_header=False, title=title, title_justify="left")
    for name, figure in figures.items():
        table.add_row(name, str(figure))
    console.print(table)


def _stop_children_on_signals() -> None:
    """Ctrl-C and SIGTERM end the children at once; what they finished is kept."""
    from flows.workers import stopping

    def stop(_signal: int, _frame: object) -> NoReturn:
        stopping.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


@contextmanager
def _wrong_use() -> Iterator[None]:
    """Wrong arguments and configurations: one message, exit code 2."""
    try:
        yield
    except ValueError as error:
        _fail(str(error), WRONG_USE)


@contextmanager
def _failures() -> Iterator[None]:
    """Work that failed: one message, exit code 1; what was computed before is kept."""
    import errno

    from flows.workers import Stopped, WorkerDied

    try:
        yield
    except (KeyboardInterrupt, Stopped):
        _fail("interrupted; give the same command again and it goes on where it was", INTERRUPTED)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        remedy = (
            "\nThe disk is full. Free some space and give the same command again: what is finished is kept." if full else ""
        )
        _fail(f"{error}{remedy}", FAILED)
    except (ValueError, ArithmeticError, WorkerDied, RuntimeError) as error:
        _fail(str(error), FAILED)
    except Exception as error:
        if not type(error).__module__.startswith(("mlflow", "prefect", "sqlalchemy", "httpx")):
            raise
        _fail(f"{type(error).__name__}: {error}", FAILED)


def _fail(message: str, code: int) -> NoReturn:
    errors.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
