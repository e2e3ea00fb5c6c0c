"""A stage of the library as a Prefect task: cached by digest, retried by cause, run in a process of its own."""

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_type_hints
from uuid import UUID

import httpx
from filelock import FileLock
from prefect import Task, get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture, wait
from prefect.states import Completed

from flows.running.attempts import begin_attempt
from flows.running.cluster import enter_crew
from flows.running.display import Display, QuietDisplay
from flows.running.fan_out import RETRY_AFTER_S, Crew, share_out
from flows.running.fitting import largest_batch, run_fitting
from flows.running.gpus import Gpus, find_gpus
from flows.running.nodes import call_on_node
from flows.running.slots import PrioritySlots
from flows.running.workers import WorkerDied, stopping, warm_up
from flows.settings import Settings
from proxyrob.device import require_devices, resolve_device
from proxyrob.errors import SourceUnavailable
from proxyrob.storage import Report, Stage

CACHED = "Cached"
"""The state of a stage that was done before; as Prefect calls it."""

DEATHS = 2
"""How many processes of a stage may die before it fails: what kills a third is in the stage, or in what it is given."""

UI_INTERVAL_S = 2.0
SHOWN_FIGURES = 2

OnFigures = Callable[[int, dict[str, float]], None]


@dataclass
class Session:
    """What the tasks of one flow run share: the environment, the display, the workers, perhaps of a cluster, and the GPUs.

    Raises ``ValueError`` when a training is to have more processes than there are GPUs.
    """

    settings: Settings
    device: str
    display: Display
    slots: PrioritySlots = field(init=False)
    crew: Crew | None = field(default=None, init=False)
    gpus: Gpus = field(init=False)
    submitted: dict[str, "Submitted"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_devices(self.device, self.settings.processes)
        self.slots = PrioritySlots(self.settings.workers)
        self.gpus = Gpus(self.settings.gpus, find_gpus(self.device))


@dataclass(frozen=True)
class Submitted:
    """A stage that was handed to the task runner."""

    stage: Stage
    future: PrefectFuture[Any]


_session: ContextVar[Session] = ContextVar("session")


@contextmanager
def open_session(session: Session) -> Iterator[Session]:
    """Make ``session`` the one that tasks submitted inside the block see; whoever shares its stages is called together.

    Raises what ``enter_crew`` raises.
    """
    token = _session.set(session)
    try:
        with enter_crew(session.settings) as session.crew:
            yield session
    finally:
        _session.reset(token)


def current_session() -> Session:
    """The session of the flow run this is called in."""
    return _session.get()


@contextmanager
def open_worker_session() -> Iterator[Session]:
    """The session that is open already, as the command line's is, or a quiet one for a worker of a Prefect server."""
    if (session := _session.get(None)) is not None:
        with _children_end_with_it():
            yield session
        return
    begin_attempt()
    settings = Settings()
    warm_up(settings.threads)
    session = Session(settings, str(resolve_device(settings.device)), QuietDisplay())
    with open_session(session), _children_end_with_it():
        yield session


@contextmanager
def _children_end_with_it() -> Iterator[None]:
    """Tell the children to end when the block is interrupted, by Ctrl-C or the SIGTERM that Prefect takes in a flow run."""
    try:
        yield
    except (KeyboardInterrupt, TerminationSignal):
        stopping.set()
        raise


def is_transient(_task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Retry only what may succeed on another try: an unreachable source or store, and a few times a process that was killed."""
    try:
        state.result()
    except (WorkerDied, ChildProcessError):
        return run.run_count <= DEATHS
    except (SourceUnavailable, ConnectionError):
        return True
    except BaseException:  # any other cause, also an interrupt, would only fail again
        return False
    return False


@task(
    persist_result=False,
    retries=len(RETRY_AFTER_S),
    retry_delay_seconds=list(RETRY_AFTER_S),
    retry_jitter_factor=0.3,
    retry_condition_fn=is_transient,
)
def run_stage(
    stage: Stage,
    label: str,
    priority: int,
    function: Callable[..., Report],
    arguments: dict[str, Any],
    on_figures: OnFigures | None,
    stoppable: bool,
    sharded: bool,
) -> Any:
    """Call one library function for one stage and return its report; that of a finished stage is read from its record.

    Prefect is given nothing to keep: a file of its results says itself how it is to be read, as a pickle if it likes, and as
    JSON still names any function to call.
    """
    if (report := stage.finished(get_type_hints(function)["return"])) is not None:
        return Completed(name=CACHED, data=report)
    session = current_session()
    stage.folder.mkdir(parents=True, exist_ok=True)
    # another run may be at the same stage
    with FileLock(stage.folder / ".lock"), _Reporter(session.display, label, stage, on_figures) as reporter:
        if sharded and session.crew is not None:
            return share_out(
                session.crew,
                function,
                stage,
                label,
                arguments,
                call=call_on_node if session.crew.is_remote else partial(_call_here, session, label, priority),
                threads=session.settings.threads,
                retry_condition=is_transient,
                on_progress=reporter,
            )
        return _call_here(
            session,
            label,
            priority,
            function,
            arguments=arguments,
            threads=session.settings.threads,
            on_progress=reporter,
            stoppable=stoppable,
            stage=stage,
            note=get_run_logger().warning,
        )


def _call_here(
    session: Session,
    label: str,
    priority: int,
    function: Callable[..., Report],
    *,
    arguments: dict[str, Any],
    note: Callable[[str], None],
    **given: Any,
) -> Report:
    """Do a stage, or share it with others, on this machine: as soon as a GPU is free, if it needs any, and a worker is."""

    def say(text: str) -> None:
        session.display.note(f"{label}: {text}")
        if not session.display.is_log:
            note(text)

    with session.gpus.placed(arguments, label, priority=priority, on_wait=say) as placed, session.slots.take(priority):
        return run_fitting(function, largest=largest_batch(arguments), note=say, **given, **placed)


def submit_stage(
    function: Callable[..., Report],
    stage: Stage,
    label: str,
    *,
    after: Iterable[PrefectFuture[Any]] = (),
    on_figures: OnFigures | None = None,
    stoppable: bool = False,
    sharded: bool = False,
    **arguments: Any,
) -> PrefectFuture[Any]:
    """Submit a stage to the task runner; stages submitted earlier get a free worker first.

    ``on_figures`` is told the figures of the stage's progress while it runs, with the number of steps done. A ``stoppable``
    function takes ``should_stop``, and stops in order when the run does. A ``sharded`` one may be called by several workers for
    the same stage at once, and is, where the session has a crew.
    A stage whose files are gone is done again. Raises ``CheckpointMismatch`` or ``DataIntegrityError`` when the stage's
    folder holds something else.
    """
    session = current_session()
    session.display.expect(label)
    if stage.record() is not None and not stage.is_whole():
        stage.forget()  # else workers that share it would take it for finished as soon as what is gone is there again
    configured = run_stage.with_options(name=label, task_run_name=label)
    future = configured.submit(
        stage=stage,
        label=label,
        priority=len(session.submitted),
        function=function,
        arguments=arguments,
        on_figures=on_figures,
        stoppable=stoppable,
        sharded=sharded,
        wait_for=list(after),
        return_state=False,
    )
    session.submitted[label] = Submitted(stage, future)
    display = session.display

    def show(done: PrefectFuture[Any]) -> None:
        try:
            done.wait()  # only now does the future know its final state
        except (asyncio.CancelledError, CancelledError):  # the run was interrupted before the stage began
            display.failed(label, "not started")
            return
        record = stage.record() if done.state.is_completed() else None
        if record is not None:
            display.finished(label, record.elapsed_s, cached=done.state.name == CACHED)
        else:
            display.failed(label, "failed" if done.state.is_failed() else "not started")

    future.add_done_callback(show)
    return future


def await_stages() -> None:
    """Wait until every submitted stage has ended.

    Raises what the first failed stage raised. (Stages after it never start, and say only that they were not ready.)
    """
    futures = [submitted.future for submitted in current_session().submitted.values()]
    with _children_end_with_it():  # at once, before anything is tidied up
        wait(futures)
    for future in futures:
        if future.state.is_failed() or future.state.is_crashed():
            future.result()
    for future in futures:
        future.result()


class _Reporter:
    """Passes progress to the terminal, and every two seconds to Prefect's pages.

    Those are told by a thread of its own: while their server is away, nobody waits and nothing fails for a bar.
    """

    def __init__(self, display: Display, label: str, stage: Stage, on_figures: OnFigures | None) -> None:
        self._display, self._label, self._on_figures = display, label, on_figures
        self._description = f"{label} ({stage.digest[:12]})"
        self._progress, self._has_ended = 0.0, threading.Event()
        self._teller = threading.Thread(target=copy_context().run, args=(self._tell_prefect,), daemon=True)

    def __enter__(self) -> "_Reporter":
        self._teller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self._teller.join(UI_INTERVAL_S)

    def __call__(self, done: int, total: int, **figures: float) -> None:
        self._display.progress(self._label, done, total, **{name: figures[name] for name in list(figures)[:SHOWN_FIGURES]})
        if self._on_figures is not None:
            self._on_figures(done, figures)
        self._progress = 100.0 * done / max(total, 1)

    def _tell_prefect(self) -> None:
        artifact, told = None, -1.0
        is_last = False
        while not is_last:
            is_last = self._has_ended.wait(UI_INTERVAL_S if told >= 0.0 else 0.0)
            if (progress := self._progress) == told:
                continue
            with suppress(httpx.HTTPError):  # the next time, then
                if artifact is None:
                    artifact = self._make_bar(progress)
                else:
                    update_progress_artifact(artifact, progress=progress)
                told = progress

    def _make_bar(self, progress: float) -> UUID:
        made = create_progress_artifact(progress=progress, key=f"progress-{self._label}", description=self._description)
        assert isinstance(made, UUID)  # a coroutine only inside an event loop, which this thread has not
        return made
