"""One training in several processes of this machine."""

import math
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from proxyrob.config.models import ModelConfig
from proxyrob.config.train import RobustTrainConfig, SmoothTrainConfig
from proxyrob.device import require_devices
from proxyrob.errors import as_portable
from proxyrob.memory import held_at_once, hold_at_once
from proxyrob.mix import SyntheticSet
from proxyrob.storage import DataPlace, Stage
from proxyrob.threat import Threat
from proxyrob.train.loop import TrainReport, train_classifier
from proxyrob.types import OnProgress, no_progress

POLL_S = 0.25
END_S = 5.0

_processes = multiprocessing.get_context("forkserver")


def train_in_processes(
    num_processes: int,
    model: ModelConfig,
    config: RobustTrainConfig | SmoothTrainConfig,
    *,
    source: Stage,
    synthetic: Sequence[SyntheticSet],
    threat: Threat | None,
    seed: int,
    stage: Stage,
    checkpoints_at: DataPlace | None = None,
    device: str = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: OnProgress = no_progress,
) -> TrainReport:
    """``train_classifier`` in several processes; where ``device`` is ``cuda`` there is one for each GPU.

    Raises what a process raised, and what ``run_in_processes`` does.
    """
    return run_in_processes(
        num_processes,
        train_classifier,
        {
            "model": model,
            "config": config,
            "source": source,
            "synthetic": synthetic,
            "threat": threat,
            "seed": seed,
            "stage": stage,
            "checkpoints_at": checkpoints_at,
        },
        device=device,
        should_stop=should_stop,
        on_progress=on_progress,
    )


def run_in_processes(
    num_processes: int,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    device: str = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: OnProgress = no_progress,
) -> Any:
    """Call ``function(**arguments, device=…, should_stop=…, on_progress=…)`` in processes that are a group of torch's.

    Returns what it returned in the first of them. They work with as many threads as this process and speak NCCL where
    ``device`` is ``cuda``, of which each gets one, and otherwise gloo, which keeps to the loopback interface. A stop that is
    asked for here, or by SIGTERM of one of them, is theirs to carry out. They end when this call does and when this process
    does, however it ends.

    Not through torch's elastic launcher, which ``torchrun`` is made of: its store listens on all interfaces, it takes over
    the signals of the process that calls it, and it has no way for progress and errors to come back. What ``torchrun`` starts
    can call ``train_classifier`` all the same.

    Raises the error of the process that failed first, with its traceback as a note, ``ChildProcessError`` where it ended
    without an answer, and ``ValueError`` where there are not as many GPUs.
    """
    require_devices(device, num_processes)
    of_gpu = torch.device(device).type == "cuda"
    # Every optimizer imports torch._dynamo, which takes seconds; but it counts GPUs, and none may be touched before a fork.
    _processes.set_forkserver_preload([__name__] if of_gpu else [__name__, "torch._dynamo"])
    with tempfile.TemporaryDirectory(prefix="proxyrob-") as folder, _Ranks() as ranks:
        for rank in range(num_processes):
            own_device = f"cuda:{rank}" if of_gpu else device
            group = _Group(rank, num_processes, own_device, "nccl" if of_gpu else "gloo", Path(folder) / "group")
            ranks.start(group, partial(function, **arguments, device=own_device))
        return ranks.attend(should_stop, on_progress)


@dataclass(frozen=True)
class _Group:
    """What a process has to know to join the others: they find each other by a file."""

    rank: int
    count: int
    device: str
    backend: str
    path: Path

    def join(self) -> None:
        if self.backend == "nccl":
            torch.cuda.set_device(self.device)
        os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        dist.init_process_group(self.backend, init_method=self.path.as_uri(), rank=self.rank, world_size=self.count)


@dataclass(frozen=True)
class _Rank:
    """One of the processes, as the one that started it sees it."""

    group: _Group
    process: BaseProcess
    link: connection.Connection

    def receive(self) -> tuple[str, Any]:
        """The next message, or that there will be none."""
        try:
            return self.link.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            self.process.join(END_S)
        error = ChildProcessError(
            f"process {self.group.rank} of {self.group.count} ended without an answer (exit code {self.process.exitcode}); "
            "exit code -9 often means that memory ran out"
        )
        return "error", (-math.inf, error)  # a cause, whenever it is noticed: nobody is ended because another failed

    def end(self) -> None:
        """To be called after its link was closed, which makes it end by itself."""
        self.process.join(END_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


class _Ranks:
    """The processes of one call; they end with the block."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for rank in self._ranks:
            rank.link.close()
        for rank in self._ranks:
            rank.end()

    def start(self, group: _Group, call: Callable[..., Any]) -> None:
        ours, theirs = _processes.Pipe()
        process = _processes.Process(target=_work, args=(theirs, group, call, torch.get_num_threads(), held_at_once()))
        process.start()
        theirs.close()
        self._ranks.append(_Rank(group, process, ours))

    def attend(self, should_stop: Callable[[], bool], on_progress: OnProgress) -> Any:
        """Pass on what is said until all have answered; the first one's result, or the error that was raised first."""
        waiting = list(self._ranks)
        results: dict[int, Any] = {}
        failures: list[tuple[float, Exception]] = []
        is_told = False
        while waiting:
            if not is_told and should_stop():
                is_told = True
                for rank in waiting:
                    with suppress(OSError):
                        rank.link.send("stop")
            ready = connection.wait([rank.link for rank in waiting], 0.0 if failures else POLL_S)
            if failures and not ready:
                break
            for rank in [rank for rank in waiting if rank.link in ready]:
                kind, value = rank.receive()
                if kind == "progress":
                    done, total, figures = value
                    on_progress(done, total, **figures)
                    continue
                waiting.remove(rank)
                if kind == "result":
                    results[rank.group.rank] = value
                else:
                    failures.append(value)
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]
        return results[0]


def _work(link: connection.Connection, group: _Group, call: Callable[..., Any], threads: int, at_once: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the caller decides
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda _signal, _frame: asked.set())
    threading.Thread(target=_listen, args=(link, asked), daemon=True).start()
    torch.set_num_threads(threads)

    def report(done: int, total: int, **figures: float) -> None:
        link.send(("progress", (done, total, figures)))

    try:
        group.join()
        with hold_at_once(at_once):
            answer = ("result", call(should_stop=asked.is_set, on_progress=report))
    except Exception as error:
        portable = as_portable(error)
        portable.add_note(f"In process {group.rank} of {group.count}:\n{traceback.format_exc()}")
        answer = ("error", (time.monotonic(), portable))
    with suppress(OSError):
        link.send(answer)
    if answer[0] == "result":
        dist.destroy_process_group()


def _listen(link: connection.Connection, asked: threading.Event) -> None:
    with suppress(EOFError, OSError):
        while link.recv():
            asked.set()
    os._exit(1)  # whoever started this process is gone, or waits for it no more
