"""A stage that several workers share: each is a Prefect task of its own, on a thread here or on a node of a cluster."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
from prefect import get_client, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun, ObjectNotFound
from prefect.futures import PrefectWrappedFuture
from prefect.states import Cancelled, Crashed
from prefect.task_runners import TaskRunner

from flows.running.nodes import describe_unshared, name_node
from flows.running.signs import Answer, Call
from flows.running.workers import Stopped, WorkerDied, stopping
from proxyrob.storage import Report, Stage
from proxyrob.types import OnProgress

POLL_S = 0.25
GRACE_S = 10.0
"""How long workers have to end after the stage is whole: one whose machine hangs is not waited for."""
DESERTED_S = 120.0
"""How long a stage waits for nodes when the cluster has none."""

RETRY_AFTER_S = (2.0, 10.0, 30.0, 60.0, 120.0)
"""How long to wait before each further try of a stage or a part: in all, as long as a server or a store takes to come back."""

ENGINES = frozenset({"distributed", "ray", "concurrent"})
"""Whose exceptions say that a task was lost: of those that the work itself raises none is from there."""

CallPart = Callable[..., Report]
"""Calls a library function for a worker: ``flows.running.nodes.call_on_node``, or the like on this machine."""


class Crew(Protocol):
    """Those that share the stages of a run."""

    @property
    def runner(self) -> TaskRunner[Any]:
        """Prefect's task runner, started."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether they are on other machines, where nothing of this process is known."""
        ...

    def size(self) -> int:
        """How many workers share a stage that begins now; 0 when there is nobody."""
        ...

    def describe(self) -> str:
        """How many there are, for people."""
        ...

    def placing(self) -> AbstractContextManager[Any]:
        """What a worker asks of its node; it is submitted inside this block."""
        ...

    def cancel(self, future: PrefectWrappedFuture[Any, Any]) -> None:
        """Give a worker up that has not begun or does not end."""
        ...


@dataclass
class Part:
    """One of the workers, and what became of it."""

    number: int
    future: PrefectWrappedFuture[Any, Any]
    ended: threading.Event = field(default_factory=threading.Event)
    outcome: Report | BaseException | None = None

    @property
    def is_lost(self) -> bool:
        """Whether it was lost, rather than failed at its work."""
        lost = isinstance(self.outcome, WorkerDied | CancelledRun | asyncio.CancelledError)
        return lost or type(self.outcome).__module__.partition(".")[0] in ENGINES


@task(
    persist_result=False,
    cache_policy=NO_CACHE,
    retries=len(RETRY_AFTER_S),
    retry_delay_seconds=list(RETRY_AFTER_S),
    retry_jitter_factor=0.3,
)
def do_part(
    call: CallPart,
    function: Callable[..., Report],
    stage: Stage,
    arguments: dict[str, Any],
    threads: int,
    signs: Path,
    number: int,
) -> Report | State[Any]:
    """Be worker ``number`` of those that share a stage: return its report when all of it is done, by whomever."""
    if not stage.folder.is_dir():
        raise RuntimeError(f"{name_node()} {describe_unshared(stage.folder)}")
    get_run_logger().info("on %s", name_node())
    answer = Answer(signs, number)
    given: dict[str, Any] = {"stage": stage, "arguments": arguments, "threads": threads}
    try:
        return call(function, **given, on_progress=answer.tell, is_wanted=answer.is_wanted, note=get_run_logger().warning)
    except Stopped:
        if answer.is_wanted():
            raise
        return Cancelled(message="the stage went on without this worker")


def share_out(
    crew: Crew,
    function: Callable[..., Report],
    stage: Stage,
    label: str,
    arguments: dict[str, Any],
    *,
    call: CallPart,
    threads: int,
    retry_condition: Callable[..., bool],
    on_progress: OnProgress,
) -> Report:
    """Have a stage done by the workers of ``crew`` together; returns when it is whole.

    A worker that dies is one less: the others take over what it was at. Raises what the workers raised when all have ended and
    the stage is not whole; ``WorkerDied`` when all were lost, or when there is nobody to do it; ``Stopped`` on interrupt.
    """
    size = _await_nodes(crew, label)
    with Call.at(stage.folder) as signs:
        part = do_part.with_options(name=f"{label} part", retry_condition_fn=retry_condition)
        parts = []
        for number in range(1, size + 1):
            parameters = {
                "call": call,
                "function": function,
                "stage": stage,
                "arguments": arguments,
                "threads": threads,
                "signs": signs.folder,
                "number": number,
            }
            named = part.with_options(task_run_name=f"{label} {number}/{size}")
            with crew.placing():
                parts.append(Part(number, crew.runner.submit(named, parameters)))
            parts[-1].future.add_done_callback(lambda _future, ended=parts[-1].ended: ended.set())
        try:
            return _await(crew, parts, label, signs, on_progress)
        finally:
            signs.withdraw()
            _dismiss(crew, parts)


def _await_nodes(crew: Crew, label: str) -> int:
    """How many workers there are to be; waits for the first node."""
    deadline = time.monotonic() + DESERTED_S
    while (size := crew.size()) == 0:
        if stopping.is_set():
            raise Stopped(f"{label} was interrupted")
        if time.monotonic() > deadline:
            raise WorkerDied(f"there is no node to do {label}: start some, and give the same command again")
        time.sleep(POLL_S)
    return size


def _await(crew: Crew, parts: list[Part], label: str, signs: Call, on_progress: OnProgress) -> Report:
    """The report of the first worker that finds the stage whole, after the others had time to find it, too."""
    report: Report | None = None
    furthest, moved_at, give_up_at = (-1.0, 0), time.monotonic(), float("inf")
    left = list(parts)
    while left:
        if stopping.is_set():
            raise Stopped(f"{label} was interrupted")
        signs.renew()
        heard = signs.hear()
        for news in heard.values():
            if (place := (news.done / max(news.total, 1), news.done)) > furthest:
                furthest, moved_at = place, time.monotonic()
                on_progress(news.done, news.total, **news.figures)
        for part in [part for part in left if part.ended.is_set()]:
            left.remove(part)
            moved_at = time.monotonic()
            part.outcome = _read_outcome(part.future)
            if isinstance(part.outcome, Report):
                report = part.outcome
                give_up_at = min(give_up_at, moved_at + GRACE_S)
            else:
                get_run_logger().warning("worker %s of %s ended: %r", part.number, label, part.outcome)
        if report is not None:
            if time.monotonic() > give_up_at or not any(part.number in heard for part in left):
                return report
        elif time.monotonic() - moved_at > DESERTED_S and crew.size() == 0:
            raise WorkerDied(f"there is no node left to do {label}: start some, and give the same command again")
        time.sleep(POLL_S)
    if report is not None:
        return report
    errors = [part.outcome for part in sorted(parts, key=lambda part: part.is_lost) if isinstance(part.outcome, BaseException)]
    if all(part.is_lost for part in parts):
        raise WorkerDied(f"all {len(parts)} workers of {label} were lost: {errors[0]}") from errors[0]
    raise errors[0]


def _read_outcome(future: PrefectWrappedFuture[Any, Any]) -> Report | BaseException:
    try:
        result = future.result()
    except (Exception, asyncio.CancelledError) as error:  # whatever the work raised, or the engine of the cluster
        return error
    return result if isinstance(result, Report) else TypeError(f"expected a report, got {result!r}")


def _dismiss(crew: Crew, parts: list[Part]) -> None:
    """Give up the workers that have not ended; of those that were lost Prefect hears from us, as not from them."""
    for part in parts:
        if not part.ended.is_set():
            crew.cancel(part.future)
        elif not part.is_lost:
            continue
        if crew.is_remote and not stopping.is_set():
            # one that never began is not known there, and the work is done whether or not Prefect learns of this
            with suppress(ObjectNotFound, httpx.HTTPError):
                asyncio.run(_tell_prefect(part.future))


async def _tell_prefect(future: PrefectWrappedFuture[Any, Any]) -> None:
    async with get_client() as client:
        lost = Crashed(message="its node was lost, or does not answer yet; the others do its work")
        await client.set_task_run_state(future.task_run_id, lost, force=True)
