"""A process of its own for each piece of heavy work: its memory, its threads and its crashes end with it."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection, forkserver, reduction
from types import MappingProxyType
from typing import Any, TypeVar

from proxyrob.errors import as_portable

T = TypeVar("T")

PRELOADED = (
    "torch",
    "diffusers",
    "proxyrob.proxy",
    "proxyrob.train",
    "proxyrob.certify",
    "proxyrob.evaluate",
    "proxyrob.export",
)

CHILDREN = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
"""The environment of all children. glibc is told to keep freed buffers, because handing them back to the kernel after every
batch makes some forward passes three times slower. And torch asks the driver's management library whether there is a GPU:
diffusers has it ask when it is imported, in the fork server, and no child of a process that has asked CUDA can use CUDA."""

END_S = 3.0
STOP_S = 25.0
"""How long a child has to end when it is told to: any, and one that first writes down how far it is."""

_processes = multiprocessing.get_context("forkserver")
_starting = threading.Lock()

stopping = threading.Event()
"""Set when the user interrupts: every child is told to end and every caller gets ``Stopped``."""


class WorkerDied(RuntimeError):
    """The process ended without an answer: killed, out of memory, crashed. The same call may succeed next time."""


class Stopped(RuntimeError):
    """The run was interrupted by the user."""


def warm_up(threads: int) -> None:
    """Start the fork server now, so that it imports torch while other things are waited for.

    Its environment is that of all children: ``threads`` for OpenMP, and ``CHILDREN``.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    for name, value in CHILDREN.items():
        os.environ.setdefault(name, value)
    _processes.set_forkserver_preload([__name__, *PRELOADED])
    # A SIGTERM for all processes at once must not reach the server: without it nobody would know how its children end.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with _unnamed_main():
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def run_in_child(
    function: Callable[..., T],
    /,
    *,
    threads: int,
    on_progress: Callable[..., None],
    stoppable: bool = False,
    is_wanted: Callable[[], bool] = lambda: True,
    environment: Mapping[str, str] = MappingProxyType({}),
    holding: Sequence[int] = (),
    at_once: int | None = None,
    **arguments: Any,
) -> T:
    """Call ``function(**arguments, on_progress=…)`` in a new process with ``threads`` torch threads.

    It has the fork server's environment, with ``environment`` over it, and the open files ``holding`` as long as it lives. It
    holds at most ``at_once`` images of a batch in memory.

    A ``stoppable`` function takes ``should_stop`` as well, which is true from the SIGTERM on that the child gets, from here on
    interrupt or from anyone; it then has ``STOP_S`` to write down how far it is. The child ends when this process does, however
    it ends. What ``function`` raises is raised here, with the child's traceback as a note, and ``OutOfMemory`` for whatever
    says that memory ran out. Raises ``WorkerDied`` when the child ends without an answer, and ``Stopped`` on interrupt or as
    soon as it is no longer wanted (asked four times a second).
    """
    if stopping.is_set() or not is_wanted():
        raise Stopped(f"{function.__name__} was not started")
    receiver, sender = _processes.Pipe(duplex=False)
    given = (dict(environment), tuple(_Held(file) for file in holding), at_once)
    process = _processes.Process(target=_work, args=(sender, function, arguments, threads, stoppable, *given))
    with _starting, _unnamed_main():
        process.start()
    sender.close()
    try:
        while not stopping.is_set() and is_wanted():
            if not connection.wait([receiver, process.sentinel], timeout=0.25):
                continue
            try:
                message = receiver.recv() if receiver.poll() else None
            except (EOFError, OSError, pickle.UnpicklingError):
                message = None
            if message is None:
                process.join(5)
                raise WorkerDied(
                    f"the process of {function.__name__} ended without an answer (exit code {process.exitcode}); "
                    "exit code -9 often means that memory ran out"
                )
            kind, value, text = message
            if kind == "progress":
                done, total, figures = value
                on_progress(done, total, **figures)
            elif kind == "result":
                return value
            else:
                value.add_note(text)
                raise value
        raise Stopped(f"{function.__name__} was interrupted")
    finally:
        _end(process, STOP_S if stoppable else END_S)
        receiver.close()


def _end(process: Any, seconds: float) -> None:
    process.join(0 if stopping.is_set() else 2)
    if process.is_alive():
        process.terminate()
        process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    process.close()


class _Held:
    """An open file that a child gets of its own when it is started, and that is closed with it."""

    def __init__(self, file: int) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return _take_over, (reduction.DupFd(self.file),)


def _take_over(file: Any) -> _Held:
    return _Held(file.detach())


def _work(
    sender: Any,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    threads: int,
    stoppable: bool,
    environment: dict[str, str],
    _holding: tuple[_Held, ...],
    at_once: int | None,
) -> None:
    os.environ.update(environment)  # before CUDA is used first, which looks at it once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    if stoppable:
        asked = threading.Event()
        signal.signal(signal.SIGTERM, lambda _signal, _frame: asked.set())
        arguments = {**arguments, "should_stop": asked.is_set}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # as the fork server has it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch  # not at the top: the fork server has it already, and the parent works without

    from proxyrob.memory import hold_at_once

    torch.set_num_threads(threads)

    def report(done: int, total: int, **figures: float) -> None:
        sender.send(("progress", (done, total, figures), ""))

    try:
        with hold_at_once(at_once):
            answer = ("result", function(**arguments, on_progress=report), "")
    except Exception as error:
        answer = ("error", as_portable(error), "In the child process:\n" + traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):
        sender.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _unnamed_main() -> Iterator[None]:
    """Keep a child from importing the parent's ``__main__`` again, which for a console script is the whole program."""
    main = sys.modules["__main__"]
    saved = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(saved)
