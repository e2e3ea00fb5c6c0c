"""Who began and who finished which unit of shared work: a line each in a file that any number of processes append to."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from proxyrob.storage.shared import SharedFiles


def count_units(log: Path, *, dies: bool = False) -> None:
    """Note every unit that this process begins and finishes, until it ends: by SIGKILL in the first of them if it ``dies``."""
    do_one = SharedFiles._do_one

    def counted(self: SharedFiles, names: Sequence[str], write: Callable[[str], None]) -> str | None:
        def noted(name: str) -> None:
            unit = f"{Path(self._store.uri).name}/{name}"
            _append(log, f"begun {os.getpid()} {unit}\n")
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            write(name)
            _append(log, f"done {os.getpid()} {unit}\n")

        return do_one(self, names, noted)

    SharedFiles._do_one = counted


def units_in(log: Path) -> tuple[Counter[str], Counter[str]]:
    """How often each unit was begun, and how often finished."""
    lines = [line.split(maxsplit=2) for line in log.read_text().splitlines()]
    return tuple(Counter(unit for what, _, unit in lines if what == wanted) for wanted in ("begun", "done"))  # pyright: ignore[reportReturnType]  (two of them)


def _append(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(line)
