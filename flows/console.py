"""What all commands share: the console, exit codes, settings, and work in a process of its own."""

import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from flows.plan import Plan, Variant

T = TypeVar("T")

console = Console()
errors = Console(stderr=True)

WRONG_USE, FAILED, INTERRUPTED = 2, 1, 130

RunArgument = Annotated[str, typer.Argument(help="A run: its output folder, its name, or the beginning of its name.")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run (folder, name or its beginning), `NAME@champion` or `NAME/3` of the registry, a training's folder, a "
        "published checkpoint (with `--as`), `module:function`, or an `.onnx` file.",
    ),
]
AsOption = Annotated[
    str | None, typer.Option("--as", metavar="NAME", help="The file holds the weights of this network of RobustBench's.")
]
SourceOption = Annotated[
    str | None,
    typer.Option(
        help="Measure on `digits`, `cifar10`, `cifar100`, `cifar2`, `parquet`, `folder`, `npz`, or on the source of a preset "
        "or YAML file. Default: the run's own."
    ),
]
PathOption = Annotated[str | None, typer.Option(help="With `--source`: the file or folder of the test images.")]
ImagesOption = Annotated[int | None, typer.Option(min=1, help="Only the first N test images.")]
SubsetSeedOption = Annotated[
    int | None, typer.Option(min=0, help="Draw the N images at random with this seed, rather than the first.")
]
OutputOption = Annotated[Path | None, typer.Option(help="Folder for tables, card and figure. Default: below PROXYROB_HOME.")]
TrackOption = Annotated[bool, typer.Option("--track", help="Also record it as a run in MLflow.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="`real-only` or `mixed`; without it the released one.")]


def prepare_settings() -> Any:
    """Settings and environment, before Prefect or MLflow is imported."""
    from pydantic import ValidationError

    from flows.settings import Settings, prepare_environment

    try:
        settings = Settings()
    except ValidationError as error:
        fault = error.errors()[0]
        message = fault["msg"].removeprefix("Value error, ")
        fail(f"PROXYROB_{str(fault['loc'][0]).upper()}: {message} (got {fault['input']!r})", WRONG_USE)
    try:
        prepare_environment(settings)
    except OSError as error:
        fail(f"{error}\nResults lie below PROXYROB_HOME; set it to another folder.", WRONG_USE)
    return settings


def work_in_child(function: Any, label: str, *, on_device: bool = True, **arguments: Any) -> Any:
    """One library function in a process of its own, with a progress bar, without Prefect."""
    settings = prepare_settings()
    from flows.running.display import TerminalDisplay
    from flows.running.fitting import largest_batch, run_fitting
    from flows.running.gpus import Gpus, find_gpus
    from flows.running.workers import warm_up
    from proxyrob.device import resolve_device

    with failures():
        if on_device:
            arguments["device"] = str(resolve_device(settings.device))
        warm_up(settings.threads)
        stop_children_on_signals()
        gpus = Gpus(settings.gpus, find_gpus(arguments.get("device", "cpu")))
        with (
            TerminalDisplay(console) as display,
            gpus.placed(arguments, label, on_wait=lambda holders: display.note(f"{label}: {holders}")) as placed,
        ):
            return run_fitting(
                function,
                largest=largest_batch(arguments),
                note=lambda text: display.note(f"{label}: {text}"),
                threads=settings.threads,
                on_progress=lambda done, total, **figures: display.progress(label, done, total, **figures),
                **placed,
            )


def work_here(function: Callable[..., T], label: str, **arguments: Any) -> T:
    """One library function in this process, with a progress bar: for work that needs neither isolation nor torch's threads."""
    from flows.running.display import TerminalDisplay

    with failures(), TerminalDisplay(console) as display:
        return function(**arguments, on_progress=lambda done, total, **figures: display.progress(label, done, total, **figures))


def find_run(name: str) -> Path:
    """The output folder of a run, by path, name or the beginning of its name.

    Raises ``ValueError`` naming the runs there are.
    """
    from flows.settings import CONFIGURATION, Settings

    given = Path(name)
    if (given / CONFIGURATION).is_file():
        return given.absolute()
    runs = Settings().runs
    known = sorted(path for path in runs.glob("*") if (path / CONFIGURATION).is_file())
    return choose_by_name(name, {path.name: path for path in known}, "run", f"in {runs}")


def choose_by_name(name: str, named: Mapping[str, T], kind: str, where: str) -> T:
    """The one called ``name``, or the only one whose name (its last part, where it has slashes) begins so.

    Raises ``ValueError`` listing those that fit, or all; ``kind`` says what they are and ``where`` in which place.
    """
    found = [name] if name in named else [known for known in named if known.rpartition("/")[2].startswith(name)]
    if len(found) == 1:
        return named[found[0]]
    listed = ", ".join(found or named) or "none yet"
    what = f"{name!r} may be any of these {kind}s" if found else f"there is no {kind} {name!r}; {kind}s"
    raise ValueError(f"{what}: {listed} ({where})")


def plan_of(folder: Path) -> "Plan":
    """The plan of a run, from the configuration in its output folder."""
    from flows.plan import plan_pipeline
    from flows.settings import CONFIGURATION, Settings
    from proxyrob.config import load_config

    settings = Settings()
    return plan_pipeline(load_config(str(folder / CONFIGURATION)), settings.store, settings.place)


def choose_variant(plan: "Plan", model: str | None) -> "Variant":
    """The model of a run by name, or the released one.

    Raises ``ValueError`` naming those there are.
    """
    for variant in plan.variants:
        if variant == (model or plan.released):
            return variant
    raise ValueError(f"this run has no model {model!r}; it has {', '.join(plan.variants)}")


def print_figures(title: str, figures: Mapping[str, Any]) -> None:
    """A title and a row for each figure."""
    console.print(title, style="italic", highlight=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 2), show_header=False)
    for name, figure in figures.items():
        table.add_row(name, str(figure))
    console.print(table)


def stop_children_on_signals() -> None:
    """Ctrl-C and SIGTERM end the children at once; what they finished is kept."""
    from flows.running.workers import stopping

    def stop(_signal: int, _frame: object) -> NoReturn:
        stopping.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


@contextmanager
def wrong_use() -> Iterator[None]:
    """Wrong arguments and configurations: one message, exit code 2."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        from proxyrob.config.load import explain

        fail(explain(error), WRONG_USE)
    except ValueError as error:
        fail(str(error), WRONG_USE)


def require_choice(option: str, given: str | None, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` when an option that was given is none of the ``choices``."""
    if given is not None and given not in choices:
        raise ValueError(f"{option}: expected {' or '.join(choices)}, got {given!r}")


@contextmanager
def failures() -> Iterator[None]:
    """Work that failed: one message, exit code 1; what was computed before is kept."""
    import errno

    from flows.running.workers import Stopped, WorkerDied

    try:
        yield
    except typer.Exit:  # told already; it is a RuntimeError, too
        raise
    except (KeyboardInterrupt, Stopped):
        fail("interrupted; give the same command again and it goes on where it was", INTERRUPTED)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        remedy = (
            "\nThe disk is full. Free some space and give the same command again: what is finished is kept." if full else ""
        )
        fail(f"{error}{remedy}", FAILED)
    except (ValueError, ArithmeticError, WorkerDied, RuntimeError) as error:
        fail(str(error), FAILED)
    except Exception as error:
        if not type(error).__module__.startswith(("mlflow", "prefect", "sqlalchemy", "httpx")):
            raise
        fail(_explain_server(error), FAILED)


def _explain_server(error: Exception) -> str:
    """What MLflow, Prefect or a database behind them said, and what to do where that is known."""
    from flows.records.patience import is_outage, summarise

    server = "Prefect" if type(error).__module__.startswith("prefect") else "MLflow"
    sign_in = {
        "Prefect": "set PREFECT_API_AUTH_STRING to user:password",
        "MLflow": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    }
    if re.search(r"\b401\b", str(error)):
        return f"{server} refuses our credentials: {sign_in[server]}"
    if re.search(r"\b403\b|PERMISSION_DENIED", str(error)):
        return f"{server} does not let this account do that ({summarise(error)})"
    if server == "MLflow" and is_outage(error):
        return f"MLflow does not answer ({summarise(error)}); start it, or correct PROXYROB_TRACKING_URI: 'proxyrob doctor'"
    return f"{type(error).__name__}: {error}"


def fail(message: str, code: int) -> NoReturn:
    """One message on stderr, and out."""
    errors.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)
