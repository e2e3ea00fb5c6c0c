"""Who began and who finished which unit of shared work: a line each in a file that any number of processes append to."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxyrob.storage import shared


@dataclass(frozen=True)
class Note:
    """``what`` is ``begun`` or ``done``, ``node`` the value of ``PROXYROB_TEST_NODE`` where it was."""

    what: str
    node: str
    unit: str


def count_units(log: Path, *, dies: bool = False, seconds: float = 0.0) -> None:
    """Note every unit that this process begins and finishes, until it ends: by SIGKILL in the first of them if it ``dies``.

    Each unit takes some ``seconds`` longer.
    """
    do_one, node = shared.SharedFiles._do_one, os.environ.get("PROXYROB_TEST_NODE", "-")

    def counted(self: shared.SharedFiles, names: Sequence[str], write: Callable[[str], None]) -> str | None:
        def noted(name: str) -> None:
            unit = f"{self._store.uri}/{name}"
            _append(log, f"begun {node} {unit}\n")
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(seconds)
            write(name)
            _append(log, f"done {node} {unit}\n")

        return do_one(self, names, noted)

    shared.SharedFiles._do_one = counted


def read_notes(log: Path) -> list[Note]:
    """All notes so far, in order; a line that is being written is left for the next time."""
    if not log.is_file():
        return []
    lines = log.read_text().splitlines(keepends=True)
    return [Note(*line.rstrip("\n").split(" ", 2)) for line in lines if line.endswith("\n")]


def units_in(log: Path) -> tuple[Counter[str], Counter[str]]:
    """How often each unit was begun, and how often finished."""
    notes = read_notes(log)
    begun, done = (Counter(note.unit for note in notes if note.what == what) for what in ("begun", "done"))
    return begun, done


def _append(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(line)
