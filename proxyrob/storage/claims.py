"""Who is at which piece of work: claims in a store, which the dead lose."""

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from proxyrob.errors import DataIntegrityError
from proxyrob.storage.stage import Report
from proxyrob.storage.store import Store

LEASE_S = 120.0
"""A claim that shows no sign of life for this long is lost."""

BEAT_S = 15.0
"""How often the holder of a claim shows that it is alive."""

_own: set[str] = set()
"""The tokens of the claims that this process holds or is about to."""


class Holder(Report):
    """Who holds a claim."""

    machine: str
    process: int
    token: str


class Claims:
    """Claims on names, in the folder ``claims`` of a store. At most one worker at a time holds the claim on a name.

    A claim is a file that only one of several writers can be the first to write. It is lost when its process has ended,
    which others on the same machine see at once, or when it has shown no sign of life for ``LEASE_S``, by the clock of the
    one who waits. A lost claim is followed by one with the next number, again written by exactly one. A worker that was
    merely asleep may find its claim lost: what it then finishes is what the other finds, too.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[str, tuple[tuple[str, bytes], float]] = {}

    @contextmanager
    def hold(self, name: str) -> Iterator[bool]:
        """Hold the claim on ``name`` for the block; ``False`` where another worker holds it."""
        token = secrets.token_hex(8)
        _own.add(token)
        try:
            keys = self._take(name, token)
            if not keys:
                yield False
                return
            done = threading.Event()
            beating = threading.Thread(target=self._beat, args=(keys[-1], done), daemon=True)
            beating.start()
            try:
                yield True
            finally:
                done.set()
                beating.join()
                for key in keys:  # ours, which is valid, is the last to go
                    self._store.delete(_sign_of_life(key))
                    self._store.delete(key)
        finally:
            _own.discard(token)

    def clear(self) -> None:
        """Remove every claim, because there is nothing left to do: those of workers that were killed as they ended."""
        for found in list(self._store.list("claims/")):
            self._store.delete(found.key)

    def _take(self, name: str, token: str) -> list[str]:
        """The claim's key after those of the lost ones that it follows; none where another worker holds it."""
        prefix = f"claims/{name.replace('/', '.')}-"
        taken = [found.key for found in self._store.list(prefix) if found.key.endswith(".json")]
        number = 0
        if taken:
            if not self._is_lost(taken[-1]):
                return []
            number = int(taken[-1].removeprefix(prefix).removesuffix(".json")) + 1
        key = f"{prefix}{number:06d}.json"
        holder = Holder(machine=_machine(), process=os.getpid(), token=token)
        return [*taken, key] if self._store.write(key, holder.model_dump_json().encode()) else []

    def _is_lost(self, key: str) -> bool:
        try:
            holder = Holder.model_validate_json(self._store.read(key))
            sign = self._store.read(_sign_of_life(key)) if self._store.stat(_sign_of_life(key)) else b""
        except FileNotFoundError:  # given back in this moment
            return False
        except ValidationError as error:
            raise DataIntegrityError(f"{self._store.uri}/{key} does not say who is at work; delete it") from error
        if holder.machine == _machine() and not _is_alive(holder.process, holder.token):
            return True
        seen, since = self._seen.get(key, (None, 0.0))
        if (shown := (holder.token, sign)) != seen:
            self._seen[key] = (shown, time.monotonic())
            return False
        return time.monotonic() - since > LEASE_S

    def _beat(self, key: str, done: threading.Event) -> None:
        beats = 0
        while not done.wait(BEAT_S):
            beats += 1
            with suppress(OSError):  # a store that does not answer now may do so at the next beat
                self._store.write(_sign_of_life(key), str(beats).encode(), replace=True)


def _sign_of_life(key: str) -> str:
    return f"{key.removesuffix('.json')}.alive"


def _machine() -> str:
    """Machine and, where there are such, process namespace: where process numbers mean the same."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace.stat().st_ino if namespace.exists() else ''}"


def _is_alive(process: int, token: str) -> bool:
    """Whether the process that holds a claim may still run; one that has this process's number and ended is not this one."""
    if process == os.getpid():
        return token in _own
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)  # signal 0 asks and does nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
