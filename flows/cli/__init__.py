"""The command line. Modules that take seconds to import are imported by the commands that need them."""

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from flows.cli import certify, compare, data, evaluate, models, stack
from flows.console import (
    RunArgument,
    console,
    failures,
    find_run,
    prepare_settings,
    stop_children_on_signals,
    wrong_use,
)

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
    with wrong_use():
        load_config(preset, changed)
    settings = prepare_settings()

    from flows.running.embedded_api import await_api, start_api
    from flows.running.reachable import require_cluster

    with failures(), wrong_use():
        require_cluster(settings)

    with failures():
        server = start_api()
        from flows.running.workers import warm_up

        warm_up(settings.threads)
        with console.status("starting Prefect and loading torch …"):
            from flows.pipeline import run_pipeline
            from flows.running.display import TerminalDisplay
            from flows.running.stages import Session, open_session
            from proxyrob.device import resolve_device

            device = str(resolve_device(settings.device))
            if server is not None:
                await_api(server)
        stop_children_on_signals()
        with TerminalDisplay(console) as display, open_session(Session(settings, device, display)) as session:
            if session.crew is not None:
                console.print(f"[dim]{session.crew.describe()}[/]", highlight=False)
            report = run_pipeline(preset, changed, None if output is None else str(output.absolute()))
    folder = output.absolute() if output else settings.runs / report["run"]
    _print_report(report, folder, preset, everything_cached=len(report["cached"]) == len(session.submitted))


@app.command()
def presets(name: Annotated[str | None, typer.Argument(help="Show this preset's file.")] = None) -> None:
    """List the presets, or show one with all that its header says."""
    from proxyrob.config import preset_names, preset_text

    if name is not None:
        with wrong_use():
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
    from flows.records.report import read_report, render_report

    with wrong_use():
        folder = find_run(run_name)
        report = read_report(folder)
    console.print(render_report(report))
    console.print(f"\n[dim]{folder}[/]")


app.command()(compare.compare)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME[@ALIAS]", help="A registered model; without alias its champion.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for model.onnx, card.md and card.json.")],
) -> None:
    """Download a registered model with its card. onnxruntime alone is enough to use it."""
    settings = prepare_settings()
    from flows.records.released import pull_model
    from flows.records.tracking import Tracker

    with failures():
        path = pull_model(Tracker(settings).uri, name, to.absolute())
    console.print(f"[green]✔[/] {path}\n[dim]read {path.parent / 'card.md'} before relying on it[/]", soft_wrap=True)


@app.command()
def history(name: Annotated[str, typer.Argument(help="A registered model, e.g. `digits-linf`.")]) -> None:
    """Show who was champion when, and why."""
    settings = prepare_settings()
    from flows.records.champions import find_champion, read_history
    from flows.records.tracking import Tracker

    with failures():
        client = Tracker(settings).once  # a person who asks is told at once
        changes, champion = read_history(client, name), find_champion(client, name)
    for change in changes:
        moment = change.at.partition(".")[0].replace("T", " ")
        before = f" (before: version {change.previous})" if change.previous not in {None, change.version} else ""
        console.print(f"{moment} UTC  version {change.version} {change.event}{before}", style="bold", highlight=False)
        console.print(f"  {escape(change.reason)}", highlight=False, soft_wrap=True)
    now = None if champion is None else int(champion.version)
    last = changes[-1] if changes else None
    expected = last.version if last is not None and last.event == "promoted" else None
    by_hand = "" if now == expected else "; the alias was changed by hand"
    console.print(f"now: {'no champion' if now is None else f'version {now}'}{by_hand}", highlight=False)


@app.command()
def ui(port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000) -> None:
    """Open MLflow's pages on loopback: compare runs, look at curves and pictures, read model cards."""
    settings = prepare_settings()
    from flows.records.tracking import Tracker
    from flows.records.views import PIPELINES, VIEW_TAG, view_link
    from flows.settings import hide_credentials

    own = settings.tracking_uri if settings.tracking_uri and settings.tracking_uri.startswith("http") else None
    address = hide_credentials(own) if own else f"http://127.0.0.1:{port}"
    with failures():
        experiments = Tracker(settings).once.search_experiments()
    for experiment in experiments:
        if VIEW_TAG + PIPELINES in experiment.tags:
            link = f"{address}/{view_link(experiment.experiment_id)}"
            console.print(f"[bold]{experiment.name}[/]  {link}", highlight=False, soft_wrap=True)
    if own:
        console.print(f"Your tracking server is {address}: open that instead.")
        return
    console.print(f"MLflow is starting on [bold]{address}[/] (ready after some seconds; Ctrl-C ends it)")
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    arguments = ["--backend-store-uri", settings.resolved_tracking_uri, "--artifacts-destination", settings.artifacts.as_uri()]
    os.execv(
        sys.executable,
        [sys.executable, "-m", "mlflow", "server", *arguments, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
    )


for command in (evaluate.evaluate, models.replay, certify.certify, models.export):
    app.command()(command)
for command in (stack.up, stack.status, stack.down, stack.doctor, stack.deploy, stack.serve):
    app.command()(command)
app.command("import")(data.import_set)
app.add_typer(data.app)


def main() -> None:
    """The console script."""
    app()


def _print_report(report: dict[str, Any], folder: Path, preset: str, *, everything_cached: bool) -> None:
    from flows.records.report import render_report
    from flows.records.views import view_link
    from flows.settings import Settings, hide_credentials

    console.print()
    console.print(render_report(report))
    if everything_cached:
        console.print("\nNothing was computed: every stage was done before (change a setting with --set, or the seed).")
    registered = report["registered"]
    change = "train.gamma=0.4" if report["proxy"] else "seed=1"
    alias = "champion" if "champion" in registered["aliases"] else "challenger"
    server = Settings().tracking_uri
    if server and server.startswith("http"):
        link = view_link(report["tracked"]["experiment"])
        console.print(f"\nIn MLflow, beside other runs: {hide_credentials(server)}/{link}", highlight=False, soft_wrap=True)
    command = "proxyrob" if shutil.which("proxyrob") else os.path.relpath(sys.argv[0])
    console.print(
        f"\nReport, pictures, model and tables: {folder}"
        f"\n\n[bold]{command} ui[/]  [dim]compare runs in MLflow[/]"
        f"\n[bold]{command} pull {registered['name']}@{alias} --to my-model[/]  [dim]the model and its card[/]"
        f"\n[bold]{command} run {preset} --set {change}[/]  [dim]again, with one setting changed[/]",
        highlight=False,
        soft_wrap=True,
    )
