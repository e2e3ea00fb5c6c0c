"""What a stage and the workers that share it, on any machine, tell each other by files in a folder that all of them see."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

from proxyrob.storage import Report
from proxyrob.storage.bounded import read_small
from proxyrob.storage.files import write_bytes

SHARED_BY = ".parts"
WANTED = "wanted"
RENEW_S = 15.0
"""How often the stage says that its workers are wanted."""
ABANDONED_S = 120.0
"""Workers whose stage has not said so for this long end: whoever waited for them was killed."""
LOOK_S = 2.0
"""How often a worker looks whether it is wanted."""
TELL_S = 1.0
"""How often a worker writes down how far it is."""


class News(Report):
    """How far a worker is, as ``OnProgress`` was told."""

    done: int
    total: int
    figures: dict[str, float]


class Call:
    """The side of the stage: calls for workers, and hears from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._times, self._renewed_at = 0, 0.0

    @classmethod
    @contextmanager
    def at(cls, folder: Path) -> Iterator["Call"]:
        """In the folder of a stage, for the block; workers of an earlier call are no longer wanted."""
        shutil.rmtree(folder / SHARED_BY, ignore_errors=True)
        call = cls(folder / SHARED_BY / token_hex(4))
        call.renew()
        try:
            yield call
        finally:
            shutil.rmtree(folder / SHARED_BY, ignore_errors=True)

    def renew(self) -> None:
        """Say that workers are wanted, unless that was said just now."""
        if self._times and time.monotonic() - self._renewed_at < RENEW_S:
            return
        self._times, self._renewed_at = self._times + 1, time.monotonic()
        write_bytes(self.folder / WANTED, str(self._times).encode())

    def withdraw(self) -> None:
        """Want no workers any more."""
        (self.folder / WANTED).unlink(missing_ok=True)

    def hear(self) -> dict[int, News]:
        """What each worker that has begun told last, by its number."""
        heard = {}
        for path in self.folder.glob("*.json"):
            with suppress(FileNotFoundError):
                heard[int(path.stem)] = News.model_validate_json(read_small(path))
        return heard


@dataclass
class Answer:
    """The side of a worker, which has a number of its own."""

    folder: Path
    number: int
    _wanted: bool = field(default=True, init=False)
    _sign: bytes = field(default=b"", init=False)
    _changed_at: float = field(default=0.0, init=False)
    _looked_at: float = field(default=float("-inf"), init=False)
    _told_at: float = field(default=float("-inf"), init=False)

    def tell(self, done: int, total: int, **figures: float) -> None:
        """Say how far the work is: an ``OnProgress``."""
        if time.monotonic() - self._told_at < TELL_S and done < total:
            return
        self._told_at = time.monotonic()
        with suppress(FileNotFoundError):  # the call has ended, and its folder is gone
            if self.folder.is_dir():
                write_bytes(
                    self.folder / f"{self.number}.json",
                    News(done=done, total=total, figures=figures).model_dump_json().encode(),
                )

    def is_wanted(self) -> bool:
        """Whether the stage still waits for this worker."""
        now = time.monotonic()
        if self._wanted and now - self._looked_at > LOOK_S:
            self._looked_at = now
            try:
                sign = (self.folder / WANTED).read_bytes()
            except FileNotFoundError:
                self._wanted = False
                return False
            if sign != self._sign:
                self._sign, self._changed_at = sign, now
            self._wanted = now - self._changed_at < ABANDONED_S
        return self._wanted
