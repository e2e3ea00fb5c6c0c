"""Places for a bounded number of workers, in the order of their priority."""

import heapq
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class PrioritySlots:
    """A bounded number of workers; of those that wait, the one with the lowest priority number goes first."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._waiting: list[int] = []
        self._changed = threading.Condition()

    @contextmanager
    def take(self, priority: int) -> Iterator[None]:
        """Wait for a slot, hold it for the block."""
        with self._changed:
            heapq.heappush(self._waiting, priority)
            self._changed.wait_for(lambda: self._free > 0 and self._waiting[0] == priority)
            heapq.heappop(self._waiting)
            self._free -= 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()
