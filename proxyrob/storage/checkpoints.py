"""Checkpoints of a stage that is under way: written beside its work, whole or not at all, found again on any machine."""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch
from pydantic import ValidationError

from proxyrob.errors import CheckpointMismatch, DataIntegrityError
from proxyrob.storage.differences import describe_differences
from proxyrob.storage.files import verify_file
from proxyrob.storage.local import LocalStore
from proxyrob.storage.place import DataPlace
from proxyrob.storage.placed import placed
from proxyrob.storage.snapshot import Snapshot, Stateful, restore_snapshot, take_snapshot, write_snapshot
from proxyrob.storage.stage import Report, Stage
from proxyrob.storage.store import Store
from proxyrob.storage.verified import remember_hash

FORMAT_VERSION = 1
FOLDER_DIGITS = 16
MAX_RECORD_BYTES = 1 << 20
NAME = re.compile(r"checkpoint-(\d{8}|[1-9]\d{8,})\.(json|pt)")


class CheckpointRecord(Report):
    """Lies beside a checkpoint's file and is written after it. Its presence says that the file is whole."""

    format_version: int
    stage: str
    digest: str
    configuration: dict[str, Any]
    step: int
    size_bytes: int
    sha256: str


class Checkpoints:
    """The checkpoints of one stage, in its scratch folder, written on a thread of their own while the stage works on.

    Each is ``checkpoint-00001200.pt`` and its record ``checkpoint-00001200.json``, which comes last and goes first. The newest
    ``keep`` stay, and there is room for one more while it is written. With a ``place`` there are copies of them below
    ``checkpoints/<stage>/<digest>/``, from which another machine that starts the same stage goes on.

        with Checkpoints(stage, place) as checkpoints:
            first, history = checkpoints.load(parts, device)
            for step in range(first, steps):
                …
                checkpoints.save(step + 1, parts, history)
            stage.finish(…)
            checkpoints.clear()

    What fails in writing is raised by the next ``save`` or at the end of the block; where the block itself failed, its error
    gets a note. A copy that cannot be sent stops no work whose own checkpoint is good, for hours of computing are worth more
    than a copy: the next one is sent in its place, the newest again at the end of the block, and if that fails, too, it is
    raised, so that nobody relies on a copy that is not there. A stage that was finished and cleared has nothing to send.

    Of several processes that work on a stage one saves.
    """

    def __init__(self, stage: Stage, place: DataPlace | None = None, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"expected to keep at least 1 checkpoint, got {keep}")
        self.stage, self.keep = stage, keep
        self._local = LocalStore(stage.scratch)
        below = f"checkpoints/{stage.name}/{stage.digest[:FOLDER_DIGITS]}"
        self._remote = None if place is None else place.below(below).open()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None
        self._taken: Snapshot | None = None
        self._unsent: OSError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        failure = self._await_writer()
        self._thread.shutdown()
        if failure is None and self._unsent is not None:
            self._send()
            failure = self._unsent
            if failure is not None:
                failure.add_note(f"the newest checkpoint of stage {self.stage.name!r} is whole, and on this machine alone")
        if failure is not None:
            if error is None:
                raise failure
            error.add_note(f"besides, a checkpoint could not be written: {failure!r}")

    def save(
        self, step: int, parts: Mapping[str, Stateful], history: Sequence[dict[str, float]] = (), *, wait: bool = False
    ) -> None:
        """Keep the state of ``parts`` after ``step`` steps, as it is now, and the ``history`` so far.

        The state is copied at once and written in the background. Waits for the checkpoint before it, so that there is never
        more than one copy; with ``wait`` also for this one, for a process that was asked to stop. Raises ``TypeError`` for
        a state that could not be read back.
        """
        if (failure := self._await_writer()) is not None:
            raise failure
        self._taken = take_snapshot(parts, history)
        self._writing = self._thread.submit(self._write_and_send, step)
        if wait and (failure := self._await_writer()) is not None:
            raise failure

    def load(self, parts: Mapping[str, Stateful], device: torch.device | str) -> tuple[int, tuple[dict[str, float], ...]]:
        """Restore ``parts`` from the newest checkpoint, here or in the store: the steps done and the history, or ``(0, ())``.

        Nothing is unpickled but tensors and plain values. Raises ``DataIntegrityError`` when that checkpoint is damaged,
        naming the file, its expected hash and what to delete; nothing is repaired, and no older one taken, without being
        asked. Raises ``CheckpointMismatch`` when it belongs to another configuration, naming the fields that differ, and
        what the store raises.
        """
        here = _steps(_files(self._local))
        there = [] if self._remote is None else _steps(_files(self._remote))
        found = sorted([*here, *there])
        if not found:
            return 0, ()
        step, name = found[-1], _name(found[-1])
        store = self._local if self._remote is None or step in here else self._remote
        then = f"goes on from step {found[-2]}" if len(found) > 1 else "starts from its first step"
        remedy = f"delete {name}.json and {name}.pt in {store.uri} and run again: this stage then {then}"
        record = self._read_record(store, step, remedy)
        if store is not self._local:
            self._fetch(store, record, remedy)
        path = self._local.folder / f"{name}.pt"
        if path.is_file() and path.stat().st_size != record.size_bytes:
            raise DataIntegrityError(_describe_damage(str(path), record, f"{path.stat().st_size} bytes", remedy))
        verify_file(path, record.sha256, remedy)
        return step, restore_snapshot(path, parts, device, remedy=self._start_anew())

    def clear(self) -> None:
        """Remove all checkpoints of the stage, here and in the store, because it is finished.

        Raises what the store raises; the stage is finished all the same.
        """
        if self._writing is not None:
            self._writing.exception()  # waits; what it failed with is raised at the end of the block
        self._unsent = None
        self.stage.clear()
        if self._remote is not None:
            for _, key in _files(self._remote):
                self._remote.delete(key)

    # ---- on the thread

    def _write_and_send(self, step: int) -> None:
        self._write(step)  # returns before sending, so that the copy of the state is gone by then
        self._send()

    def _write(self, step: int) -> None:
        taken, self._taken = self._taken, None
        assert taken is not None
        self._sweep()
        path = self._local.folder / f"{_name(step)}.pt"
        with placed(path, replace=True) as placing:
            write_snapshot(taken, placing)
            self._local.delete(f"{_name(step)}.json")  # of this step, if any: a record never lies beside another file
        remember_hash(path, placing.sha256, placing.status)
        record = CheckpointRecord(
            format_version=FORMAT_VERSION,
            stage=self.stage.name,
            digest=self.stage.digest,
            configuration=self.stage.configuration,
            step=step,
            size_bytes=placing.size_bytes,
            sha256=placing.sha256,
        )
        self._local.write(f"{_name(step)}.json", _as_json(record), replace=True)
        _prune(self._local, step, self.keep)

    def _sweep(self) -> None:
        """Remove what a killed writer left."""
        for path in self._local.folder.glob(".checkpoint-*.part"):
            path.unlink()
        files = _files(self._local)
        whole = _steps(files)
        for step, key in files:
            if step not in whole:
                self._local.delete(key)

    def _send(self) -> None:
        """Copy the newest checkpoint to the store, where older ones then go; a failure is noted for later."""
        if self._remote is None:
            return
        step = _steps(_files(self._local))[-1]
        file, record = f"{_name(step)}.pt", f"{_name(step)}.json"
        try:
            self._remote.delete(record)
            self._remote.upload(file, self._local.folder / file, replace=True)
            self._remote.write(record, self._local.read(record), replace=True)
            _prune(self._remote, step, self.keep)
            self._unsent = None
        except OSError as error:
            self._unsent = error

    # ---- on the caller's

    def _await_writer(self) -> BaseException | None:
        """Wait until the checkpoint under way is written; what that failed with."""
        if self._writing is None:
            return None
        failure = self._writing.exception()
        self._writing = None
        return failure

    def _read_record(self, store: Store, step: int, remedy: str) -> CheckpointRecord:
        key = f"{_name(step)}.json"
        place = f"{store.uri}/{key}"
        info = store.stat(key)
        if info is not None and info.size_bytes > MAX_RECORD_BYTES:
            raise DataIntegrityError(f"{place} has {info.size_bytes} bytes, a record at most {MAX_RECORD_BYTES}; {remedy}")
        try:
            record = CheckpointRecord.model_validate_json(store.read(key))
        except ValidationError as error:
            raise DataIntegrityError(
                f"{place} cannot be read as format {FORMAT_VERSION} of a checkpoint's record; {remedy}"
            ) from error
        if record.format_version != FORMAT_VERSION:
            raise DataIntegrityError(
                f"{place} has format {record.format_version}, this program reads format {FORMAT_VERSION}; use the program that "
                f"wrote it, or {self._start_anew()}"
            )
        if record.digest != self.stage.digest:
            raise CheckpointMismatch(
                f"{place} was written by another configuration of stage {record.stage!r} (digest {record.digest[:12]}, "
                f"expected {self.stage.digest[:12]}): "
                f"{describe_differences(record.configuration, self.stage.configuration)}; {self._start_anew()}"
            )
        if record.step != step:
            raise DataIntegrityError(f"{place} is the record of step {record.step}; {remedy}")
        return record

    def _fetch(self, store: Store, record: CheckpointRecord, remedy: str) -> None:
        """Make a checkpoint of the store one of this machine."""
        key = f"{_name(record.step)}.pt"
        place = f"{store.uri}/{key}"
        info = store.stat(key)
        if info is None or info.size_bytes != record.size_bytes:
            found = "nothing" if info is None else f"{info.size_bytes} bytes"
            raise DataIntegrityError(_describe_damage(place, record, found, remedy))
        try:
            store.download(key, self._local.folder / key, sha256=record.sha256, size_bytes=record.size_bytes)
        except DataIntegrityError as error:
            raise DataIntegrityError(_describe_damage(place, record, "other bytes", remedy)) from error
        self._local.write(f"{_name(record.step)}.json", _as_json(record), replace=True)

    def _start_anew(self) -> str:
        places = self._local.uri if self._remote is None else f"{self._local.uri} and {self._remote.uri}"
        return f"delete {places} and run again: this stage then starts from its first step"


def _name(step: int) -> str:
    return f"checkpoint-{step:08d}"


def _as_json(record: CheckpointRecord) -> bytes:
    return (record.model_dump_json(indent=2) + "\n").encode()


def _files(store: Store) -> list[tuple[int, str]]:
    """The keys of checkpoints with their steps, each record before the file it describes."""
    found = (NAME.fullmatch(info.key) for info in store.list("checkpoint-"))
    return sorted((int(name[1]), name[0]) for name in found if name is not None)


def _steps(files: list[tuple[int, str]]) -> list[int]:
    """The steps whose checkpoints are whole, the newest last."""
    return [step for step, key in files if key.endswith(".json")]


def _prune(store: Store, newest: int, keep: int) -> None:
    """Remove what is older than the ``keep`` newest checkpoints up to ``newest``, and older files without a record."""
    files = _files(store)
    older = [step for step in _steps(files) if step < newest]
    kept = older[max(0, len(older) - keep + 1) :]
    for step, key in files:
        if step < newest and step not in kept:
            store.delete(key)


def _describe_damage(place: str, record: CheckpointRecord, found: str, remedy: str) -> str:
    return f"{place} is damaged: expected {record.size_bytes} bytes with sha256 {record.sha256}, got {found}; {remedy}"
