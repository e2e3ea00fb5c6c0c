"""Work that any number of workers share: named units in a place, each done once by whoever comes first."""

import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from proxyrob.errors import CheckpointMismatch
from proxyrob.evaluate.adversarial import ENCODING
from proxyrob.evaluate.claims import Claims
from proxyrob.storage import DataPlace
from proxyrob.storage.bounded import parse_json, read_table
from proxyrob.storage.differences import describe_differences

BINDING = "binding.json"
BOUND_TO = b"proxyrob.binding"
POLL_S = 0.5
UNIT_BYTES = 2 << 30


class EndedElsewhere(Exception):
    """Another worker has finished the whole work meanwhile."""


class SharedWork:
    """Units of one piece of work: tables, each written once and whole, and bound by a hash to what they depend on.

    ``about`` says what that is, as JSON values. A worker that is killed loses the unit it was at; any other goes on with it.
    ``has_ended`` says whether the whole work is finished and its units may be gone.

    Raises ``CheckpointMismatch``, naming what differs, when the place holds units of other work.
    """

    def __init__(self, place: DataPlace, about: dict[str, Any], has_ended: Callable[[], bool] = lambda: False) -> None:
        self._store = place.open()
        self._has_ended = has_ended
        self._claims = Claims(self._store)
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

    def has(self, name: str) -> bool:
        """Whether a unit is there."""
        return self._store.stat(_key(name)) is not None

    def read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A unit's table, or some columns of it.

        Raises ``DataIntegrityError`` when it cannot be read, ``CheckpointMismatch`` when it belongs to other work, and
        ``EndedElsewhere``.
        """
        where = f"{self._store.uri}/{_key(name)}"
        try:
            content = self._store.read(_key(name), limit_bytes=UNIT_BYTES)
        except FileNotFoundError:
            self._require_unfinished()
            raise
        table = read_table(content, where, "delete it: then it alone is done anew", columns)
        if (table.schema.metadata or {}).get(BOUND_TO) != self._bound.encode():
            raise CheckpointMismatch(f"{where} was found under other conditions than those in {BINDING} beside it; delete it")
        return table

    def complete(
        self, names: Sequence[str], compute: Callable[[str], pa.Table], look: Callable[[set[str]], bool] = lambda done: False
    ) -> None:
        """Return when every unit is there, done by this worker or by others.

        ``look`` is told which units are there, before each that this worker does and at the end; where it says that these are
        enough, the others are left undone. Raises ``EndedElsewhere``.
        """
        while True:
            done = {name for name in names if self.has(name)}
            if look(done) or len(done) == len(names):
                return
            if not self._do_one([name for name in names if name not in done], compute):
                self._require_unfinished()
                time.sleep(POLL_S)

    def _do_one(self, names: Sequence[str], compute: Callable[[str], pa.Table]) -> bool:
        """Do the first unit that nobody else is at, if there is one."""
        for name in names:
            with self._claims.hold(name) as is_mine:
                if is_mine:
                    self._require_unfinished()
                    if not self.has(name):
                        self._write(name, compute(name))
                        return True
        return False

    def conclude(self, act: Callable[[], None]) -> None:
        """Have one worker do ``act``, which finishes the work. Raises ``EndedElsewhere`` in all others."""
        while True:
            with self._claims.hold("conclusion") as is_mine:
                self._require_unfinished()
                if is_mine:
                    act()
                    return
            time.sleep(POLL_S)

    def _require_unfinished(self) -> None:
        if self._has_ended():
            raise EndedElsewhere(f"another worker has finished what lies at {self._store.uri}")

    def _write(self, name: str, table: pa.Table) -> None:
        content = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({BOUND_TO: self._bound}), content, **ENCODING)
        self._store.write(_key(name), content.getvalue())


def _key(name: str) -> str:
    return f"{name}.parquet"
