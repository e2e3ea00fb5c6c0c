"""Stopping a training in order, in one process or in several at once."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from proxyrob.train.processes import ALONE, Processes

POLL_S = 0.25
ASKED = "asked"


class Stop:
    """A request to stop, which any of the processes of a training may be given and all follow together.

    Between two steps of an attack no process hears from another, and none may leave while others are going to wait for it.
    So the request takes two ways. A process that is asked leaves its work and sets a key in the group's store; the others
    look for that key every ``POLL_S`` and leave theirs. Then all meet at the end of ``agreed``, where each says whether it
    has left: this decides, and either all go on or all stop at the same step. The key only makes it quick. A look at the
    store costs a fraction of a millisecond and the meeting as much, where an exchange at every step of an attack would make
    all processes wait for the slowest one each time.
    """

    def __init__(self, processes: Processes = ALONE, asked: Callable[[], bool] = lambda: False) -> None:
        self.processes, self._asked = processes, asked
        self._store = processes.open_store() if processes.count > 1 else None
        self._looked = time.monotonic()

    def check(self) -> None:
        """Raise ``InterruptedError`` when this process was asked to stop or knows that another was; inside ``agreed`` alone."""
        if self._asked():
            if self._store is not None:
                self._store.set(ASKED, "")
            raise InterruptedError
        if self._store is not None and time.monotonic() - self._looked > POLL_S:
            self._looked = time.monotonic()
            if self._store.check([ASKED]):
                raise InterruptedError

    def check_together(self) -> None:
        """``check`` for work in which the processes wait for each other all the time: all raise at the same place."""
        if self.processes.any(self._asked()):
            raise InterruptedError

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Work that each process does by itself and may leave by ``check``: all raise ``InterruptedError`` if one has."""
        has_left = False
        try:
            yield
        except InterruptedError:
            has_left = True
        if self.processes.any(has_left):
            raise InterruptedError


NEVER = Stop()
