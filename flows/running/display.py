"""What a person at the terminal sees while a run goes on."""

import sys
import threading
from types import TracebackType
from typing import Protocol, Self

from prefect import get_run_logger
from prefect.exceptions import MissingContextError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display(Protocol):
    """Shows stages as they wait, work and end. Called from several threads."""

    is_log: bool
    """Whether its notes stand in the run's log, so that nobody has to write them there."""

    def expect(self, label: str) -> None: ...

    def progress(self, label: str, done: int, total: int, **figures: float) -> None: ...

    def finished(self, label: str, seconds: float, cached: bool) -> None: ...

    def failed(self, label: str, reason: str) -> None: ...

    def note(self, text: str) -> None: ...


class QuietDisplay:
    """Shows nothing but notes: for workers of a Prefect server, whose UI shows the same."""

    is_log = True

    def expect(self, label: str) -> None: ...

    def progress(self, label: str, done: int, total: int, **figures: float) -> None: ...

    def finished(self, label: str, seconds: float, cached: bool) -> None: ...

    def failed(self, label: str, reason: str) -> None: ...

    def note(self, text: str) -> None:
        """To the run's log, or where a thread of no run says it to the worker's."""
        try:
            get_run_logger().warning(text)
        except MissingContextError:
            print(text, file=sys.stderr, flush=True)


class TerminalDisplay:
    """Bars with an estimate of the time left on a terminal; one line for each finished stage elsewhere."""

    is_log = False

    def __init__(self, console: Console) -> None:
        self.console = console
        self._lock = threading.Lock()
        self._bars: dict[str, TaskID] = {}
        self._expected = 0
        self._ended = 0
        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}", style="dim"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def expect(self, label: str) -> None:
        with self._lock:
            self._expected += 1

    def progress(self, label: str, done: int, total: int, **figures: float) -> None:
        text = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
        with self._lock:
            if label not in self._bars:
                self._bars[label] = self._live.add_task(f"{label:<34}", total=total, figures="")
            self._live.update(self._bars[label], completed=done, total=total, figures=text)

    def finished(self, label: str, seconds: float, cached: bool) -> None:
        self._end(label, f"[green]✔[/] {label:<34} " + ("[dim]cached[/]" if cached else f"{seconds:6.1f} s"))

    def failed(self, label: str, reason: str) -> None:
        self._end(label, f"[red]✘[/] {label:<34} {reason}")

    def note(self, text: str) -> None:
        """What goes on meanwhile, such as a server that is waited for."""
        self.console.print(f"[yellow]![/] {escape(text)}", highlight=False, soft_wrap=True)

    def _end(self, label: str, line: str) -> None:
        with self._lock:
            self._ended += 1
            bar = self._bars.pop(label, None)
            if bar is not None:
                self._live.remove_task(bar)
            self.console.print(f"{line}  [dim]{self._ended}/{self._expected}[/]", highlight=False)
