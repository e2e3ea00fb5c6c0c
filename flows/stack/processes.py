"""Processes that were recorded in a file: whether they are still the same, and how they end.

A number alone does not say which process it is: it is given to another one some day. It is ours when it was created at the
recorded moment, or when it carries the stack's mark in its environment.
"""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Self

import psutil
from pydantic import BaseModel, ConfigDict

MARK = "PROXYROB_STACK_MARK"
"""Every process of a stack inherits it, also those that its servers and workers start."""

SAME_MOMENT_S = 0.05
KILLED_S = 10.0


class Recorded(BaseModel):
    """A process, by number and moment of its creation (seconds since 1970)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int
    created_at: float

    @classmethod
    def of(cls, pid: int) -> Self:
        """The process that has this number now. Raises ``psutil.NoSuchProcess`` when there is none."""
        return cls(pid=pid, created_at=psutil.Process(pid).create_time())

    def find(self) -> psutil.Process | None:
        """The process, while it runs; ``None`` when it has ended, whoever has its number now."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created_at) < SAME_MOMENT_S
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None


def find_marked(mark: str) -> list[psutil.Process]:
    """All processes of the stack with this mark but the calling one, whoever started them."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def find_marks() -> dict[int, str]:
    """The mark of every process that has one, by process number."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if (mark := process.environ().get(MARK)) is not None and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = mark
    return found


def find_listener(port: int) -> str | None:
    """Who listens on a port of this machine, as far as that may be known: ``None`` when nobody does."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                if connection.pid is None:
                    return "a process of another user"
                with suppress(psutil.Error):
                    command = " ".join(psutil.Process(connection.pid).cmdline())
                    return f"process {connection.pid} ({' '.join(command.split())[:80]})"
    return None


def end_processes(processes: Iterable[psutil.Process], patience_s: float) -> None:
    """Ask each to end, and kill what has not after ``patience_s``."""
    asked = list(processes)
    for process in asked:
        with suppress(psutil.Error):
            process.terminate()
    deadline = time.monotonic() + patience_s
    kill_processes([process for process in asked if not wait_until_ended(process, deadline - time.monotonic())])


def kill_processes(processes: Iterable[psutil.Process]) -> None:
    """Kill each and wait until it is gone."""
    killed = list(processes)
    for process in killed:
        with suppress(psutil.Error):
            process.kill()
    for process in killed:
        wait_until_ended(process, KILLED_S)


def wait_until_ended(process: psutil.Process, patience_s: float) -> bool:
    """Whether the process has ended, after at most ``patience_s``. One that nobody has taken notice of yet (a zombie) has."""
    deadline = time.monotonic() + patience_s
    while True:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.05)
                continue
        return True
