"""Work that any number of workers share: named units in a place, each done once by whoever comes first."""

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from proxyrob.errors import CheckpointMismatch
from proxyrob.storage.bounded import as_frame, parse_json, read_table
from proxyrob.storage.claims import Claims
from proxyrob.storage.differences import describe_differences
from proxyrob.storage.place import DataPlace
from proxyrob.storage.stage import Report, Stage

BINDING = "binding.json"
BOUND_TO = b"proxyrob.binding"
UNIT_BYTES = 2 << 30
REMEDY = "delete it: then it alone is done anew"
POLL_S = 0.5
LIST_S = 2.0
"""How often a worker that is at work looks what others have done."""

R = TypeVar("R", bound=Report)
T = TypeVar("T")


class EndedElsewhere(Exception):
    """Another worker has finished the whole work meanwhile."""


def finish_once(stage: Stage, kind: type[R], work: Callable[[float], R]) -> R:
    """What the stage holds already, or what ``work`` finds, told when it began, or another worker in the meantime."""
    if (report := stage.finished(kind)) is not None:
        return report
    try:
        report = work(time.monotonic())
    except (EndedElsewhere, FileNotFoundError):  # the second: another worker finished and cleared the scratch folder just now
        if (report := stage.finished(kind)) is None:
            raise
    stage.clear()
    return report


class SharedFiles:
    """Units of one piece of work: files ``NAME + suffix`` in a place, each written once and whole.

    A worker that is killed loses the unit it was at; any other goes on with it. ``has_ended`` says whether the whole work is
    finished and its units may be gone.
    """

    def __init__(self, place: DataPlace, suffix: str, has_ended: Callable[[], bool]) -> None:
        self._store = place.open()
        self._suffix, self._has_ended = suffix, has_ended
        self._claims = Claims(self._store)

    def complete(
        self, names: Sequence[str], write: Callable[[str], None], look: Callable[[set[str]], bool] = lambda done: False
    ) -> None:
        """Return when every unit is there, done by this worker or by others.

        ``write`` makes one. ``look`` is told which are there, as far as is known, before each that this worker does, and all of
        them at the end; where it says that these are enough, the others are left undone. Raises ``EndedElsewhere``.
        """
        done, listed_at = self._find(names), time.monotonic()
        while not look(set(done)) and len(done) < len(names):
            mine = self._do_one([name for name in names if name not in done], write)
            if mine is None:
                self._require_unfinished()
                time.sleep(POLL_S)
            else:
                done.add(mine)
            if mine is None or time.monotonic() - listed_at > LIST_S:
                done, listed_at = self._find(names), time.monotonic()

    def conclude(self, act: Callable[[], T]) -> T:
        """Have one worker do ``act``, which finishes the work. Raises ``EndedElsewhere`` in all others."""
        while True:
            with self._claims.hold("conclusion") as is_mine:
                self._require_unfinished()
                if is_mine:
                    result = act()
                    self._claims.clear()
                    return result
            time.sleep(POLL_S)

    def _do_one(self, names: Sequence[str], write: Callable[[str], None]) -> str | None:
        """Do the first unit that nobody else is at or has done, if there is one."""
        for name in names:
            with self._claims.hold(name) as is_mine:
                if is_mine:
                    self._require_unfinished()
                    if not self._is_there(name):
                        write(name)
                        return name
        return None

    def _is_there(self, name: str) -> bool:
        """Ask for the file, and list: some stores list late, and a network file system may believe for a while that a file is
        missing which it has asked for before."""
        return self._store.stat(f"{name}{self._suffix}") is not None or bool(self._find([name]))

    def _find(self, names: Sequence[str]) -> set[str]:
        """The units that are listed."""
        prefix = os.path.commonprefix(list(names))  # noqa: RUF071  (character by character is how stores list)
        there = {found.key for found in self._store.list(prefix)}
        return {name for name in names if f"{name}{self._suffix}" in there}

    def _require_unfinished(self) -> None:
        if self._has_ended():
            raise EndedElsewhere(f"another worker has finished what lies at {self._store.uri}")


class SharedTables(SharedFiles):
    """Units that are tables, bound by a hash to what they depend on.

    ``about`` says what that is, as JSON values; ``encoding`` is what ``pyarrow.parquet.write_table`` is to be told.

    Raises ``CheckpointMismatch``, naming what differs, when the place holds units of other work.
    """

    def __init__(
        self, place: DataPlace, about: dict[str, Any], has_ended: Callable[[], bool], encoding: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(place, ".parquet", has_ended)
        self._encoding = dict(encoding or {})
        content = json.dumps(about, sort_keys=True, indent=1, allow_nan=False).encode()
        self._bound = hashlib.sha256(content).hexdigest()
        if not self._store.write(BINDING, content):
            where = f"{self._store.uri}/{BINDING}"
            there = parse_json(self._store.read(BINDING), where, f"delete {self._store.uri} to begin anew")
            if there != json.loads(content):
                raise CheckpointMismatch(
                    f"{self._store.uri} holds unfinished work under other conditions than these: "
                    f"{describe_differences(there, about)}; delete it to begin anew, or use another place"
                )

    def tabulate(
        self, names: Sequence[str], compute: Callable[[str], pa.Table], look: Callable[[set[str]], bool] = lambda done: False
    ) -> None:
        """As ``complete``, of units whose tables ``compute`` gives."""
        self.complete(names, lambda name: self._write(name, compute(name)), look)

    def read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A unit's table, or some columns of it.

        Raises ``DataIntegrityError`` when it cannot be read, ``CheckpointMismatch`` when it belongs to other work, and
        ``EndedElsewhere``.
        """
        key = f"{name}{self._suffix}"
        where = f"{self._store.uri}/{key}"
        try:
            content = self._store.read(key, limit_bytes=UNIT_BYTES)
        except FileNotFoundError:
            self._require_unfinished()
            raise
        table = read_table(content, where, REMEDY, columns)
        if (table.schema.metadata or {}).get(BOUND_TO) != self._bound.encode():
            raise CheckpointMismatch(f"{where} was found under other conditions than those in {BINDING} beside it; delete it")
        return table

    def join(self, names: Sequence[str]) -> pd.DataFrame:
        """The units as one data frame, in the order of ``names``. Raises as ``read`` does."""
        tables = [as_frame(self.read(name), f"unit {name} of {self._store.uri}", REMEDY) for name in names]
        return pd.concat(tables, ignore_index=True)

    def _write(self, name: str, table: pa.Table) -> None:
        content = io.BytesIO()
        bound = table.replace_schema_metadata({**(table.schema.metadata or {}), BOUND_TO: self._bound})
        pq.write_table(bound, content, **self._encoding)
        self._store.write(f"{name}{self._suffix}", content.getvalue())
