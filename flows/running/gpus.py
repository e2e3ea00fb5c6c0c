"""GPUs: a stage that computes on one has it for itself, whoever else computes on this machine."""

import fcntl
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from flows.running.slots import PrioritySlots
from flows.running.workers import Stopped, run_in_child, stopping

VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL_S = 0.1
PATIENCE_S = 2.0
"""After which it is said what is waited for."""

_tickets = itertools.count()


class Gpu(NamedTuple):
    """A GPU: what ``CUDA_VISIBLE_DEVICES`` calls it here, and what identifies it whoever asks."""

    token: str
    identity: str


class Taken(NamedTuple):
    """GPUs that were taken: the environment in which a process sees them and no other, and open files that keep them.

    A GPU is free when every process that has its file open has ended or closed it, however that came about.
    """

    environment: Mapping[str, str]
    files: tuple[int, ...]


class Holder(NamedTuple):
    """Who has a GPU."""

    process: int
    what: str
    since: float

    def describe(self) -> str:
        """For people."""
        if not self.process:
            return "just taken or given back"
        return f"which process {self.process} has since {time.strftime('%H:%M:%S', time.localtime(self.since))} ({self.what})"


class Gpus:
    """The GPUs of a run, each at most one stage's at a time, among all processes that name the same folder.

    Every GPU has a file there, and whoever has locked it has the GPU: the kernel unlocks what a dead process held. Who waits
    draws a ticket, and the oldest one is served first, so that a stage that needs several GPUs is not passed over by those
    that need one. It alone collects what becomes free, so that no two wait for each other.
    """

    def __init__(self, folder: Path, gpus: Sequence[Gpu]) -> None:
        self.gpus = tuple(gpus)
        self._folder = folder / _this_machine()
        self._queue = PrioritySlots(1)

    @contextmanager
    def take(
        self, count: int, what: str, *, priority: int = 0, on_wait: Callable[[str], None] = lambda holders: None
    ) -> Iterator[Taken]:
        """Wait for ``count`` GPUs and have them for the block; ``what`` tells others what for.

        Of those that wait in this process the one with the lowest priority number goes first. ``on_wait`` is told who has the
        GPUs, if it takes a while. Raises ``ValueError`` when there are not as many, and ``Stopped`` on interrupt.
        """
        if not 0 < count <= len(self.gpus):
            raise ValueError(f"{what} needs {count} GPUs, of which there are {len(self.gpus)}")
        with ExitStack() as stack:
            with self._queue.take(priority), self._served():
                taken = self._collect(count, what, stack, on_wait)
            tokens = ",".join(gpu.token for gpu, _ in taken)
            yield Taken({VISIBLE: tokens}, tuple(file for _, file in taken))

    @contextmanager
    def placed(
        self, arguments: Mapping[str, Any], what: str, *, priority: int = 0, on_wait: Callable[[str], None]
    ) -> Iterator[dict[str, Any]]:
        """The arguments of a stage and of its process, with GPUs of its own where it computes on any: one, or one for each
        process of a training. What has no ``device``, or another, waits for nothing."""
        if not str(arguments.get("device")).startswith("cuda"):
            yield dict(arguments)
            return
        with self.take(arguments.get("num_processes", 1), what, priority=priority, on_wait=on_wait) as taken:
            yield {**arguments, "device": "cuda", "environment": taken.environment, "holding": taken.files}

    def holders(self) -> dict[Gpu, Holder | None]:
        """Who has each GPU now; nothing is waited for."""
        found: dict[Gpu, Holder | None] = {}
        for gpu in self.gpus:
            file = _lock(self._path(gpu))
            if file is not None:
                os.close(file)
            found[gpu] = self._holder(gpu) if file is None else None
        return found

    def _collect(self, count: int, what: str, stack: ExitStack, on_wait: Callable[[str], None]) -> list[tuple[Gpu, int]]:
        taken: dict[Gpu, int] = {}
        begun, is_told = time.monotonic(), False
        while True:
            _require_not_stopping()
            for gpu in self.gpus:
                if len(taken) < count and gpu not in taken and (file := _lock(self._path(gpu))) is not None:
                    stack.callback(os.close, file)
                    _write(file, json.dumps([os.getpid(), what, time.time()]).encode())
                    stack.callback(_write, file, b"")
                    taken[gpu] = file
            if len(taken) == count:
                return [(gpu, taken[gpu]) for gpu in self.gpus if gpu in taken]
            if not is_told and time.monotonic() - begun > PATIENCE_S:
                is_told = True
                missing = [f"GPU {gpu.token}, {self._holder(gpu).describe()}" for gpu in self.gpus if gpu not in taken]
                on_wait(f"waits for {', '.join(missing)}")
            time.sleep(POLL_S)

    @contextmanager
    def _served(self) -> Iterator[None]:
        """Wait until no older ticket is left, and collect alone for the block.

        A ticket is a file whose owner has locked it, so that those of the dead are known. It has its lock before it has its
        name. The second lock is for one that was drawn earlier and got its name later.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time_ns():020d}-{os.getpid()}-{next(_tickets)}.ticket"
        unnamed = self._folder / f".{name}"
        own = _lock(unnamed)
        assert own is not None  # nobody else knows this name
        try:
            unnamed.rename(self._folder / name)
            turn = None
            while turn is None:
                _require_not_stopping()
                turn = None if self._has_older(name) else _lock(self._folder / "turn")
                if turn is None:
                    time.sleep(POLL_S)
            try:
                yield
            finally:
                os.close(turn)
        finally:
            (self._folder / name).unlink(missing_ok=True)
            os.close(own)

    def _has_older(self, name: str) -> bool:
        """Whether somebody alive drew a ticket before; those of the dead are removed."""
        for path in sorted(self._folder.glob("[0-9]*.ticket")):
            if path.name >= name:
                return False
            file = _lock(path)
            if file is None:
                return True
            path.unlink(missing_ok=True)
            os.close(file)
        return False

    def _path(self, gpu: Gpu) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{gpu.identity}.gpu"

    def _holder(self, gpu: Gpu) -> Holder:
        with suppress(OSError, ValueError, TypeError):
            return Holder(*json.loads(self._path(gpu).read_bytes()))
        return Holder(0, "", 0.0)


def find_gpus(device: str) -> tuple[Gpu, ...]:
    """The GPUs that are visible to this process, or the one that ``device`` means of them; none for ``cpu``.

    They are asked for in a process of its own: CUDA reads which are visible when it is used first, and cannot be used by the
    children of a process that has.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return ()
    visible = os.environ.get(VISIBLE)
    environment = {} if visible is None else {VISIBLE: visible}
    identities = run_in_child(_ask_cuda, threads=1, on_progress=lambda *_, **__: None, environment=environment)
    tokens = map(str, range(len(identities))) if visible is None else (token.strip() for token in visible.split(","))
    gpus = tuple(Gpu(*found) for found in zip(tokens, identities, strict=False))
    return (gpus[int(index)],) if index else gpus


def _ask_cuda(on_progress: Callable[..., Any]) -> tuple[str, ...]:
    import torch  # not at the top: the fork server has it already, and who merely looks at files works without

    return tuple(str(torch.cuda.get_device_properties(k).uuid) for k in range(torch.cuda.device_count()))


def _this_machine() -> str:
    """What all processes of a machine agree on, those in containers, too, which have names of their own."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except FileNotFoundError:  # not Linux
        return socket.gethostname()


def _lock(path: Path) -> int | None:
    """An open file with the lock on it, or ``None`` while somebody else has it; it is unlocked by closing it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def _write(file: int, content: bytes) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, content, 0)


def _require_not_stopping() -> None:
    if stopping.is_set():
        raise Stopped("interrupted while waiting for a GPU")
