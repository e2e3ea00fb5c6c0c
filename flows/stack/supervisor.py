"""One process that starts the servers and workers of a stack, starts again what dies, and ends them all.

``proxyrob up`` runs it; ``python -m flows.stack.supervisor PREFECT_PORT MLFLOW_PORT POOL …`` is what it runs in the
background. It holds a lock for as long as it lives, so that there is one of a home. Of a server that died, what it started
itself is killed before the server is started again, after a pause that doubles from one second to a minute.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import psutil
from filelock import FileLock, Timeout

from flows.settings import Settings, prepare_environment
from flows.stack.answers import ask, credentials_of
from flows.stack.processes import Recorded, kill_processes
from flows.stack.services import without_server_secrets
from flows.stack.state import (
    DEPLOY,
    LOCK,
    SERVERS,
    Part,
    State,
    describe_part,
    end_parts,
    forget_state,
    log_of,
    needed_by,
    part_names,
    read_state,
    write_state,
)

LOOK_S = 0.5
ANSWER_S = 3.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
STEADY_S = 60.0
"""After so long without a fault the next pause is the first one again."""
LONGEST_LOG_BYTES = 10_000_000


@dataclass
class Supervised:
    """One process: the one that runs now, and when it may be started again."""

    name: str
    child: subprocess.Popen[bytes] | None = None
    process: Recorded | None = None
    condition: Any = "waiting"
    since: float = field(default_factory=time.time)
    restarts: int = 0
    ready_after_s: float | None = None
    fault: str | None = None
    pause_s: float = FIRST_PAUSE_S
    start_at: float = 0.0

    def become(self, condition: str) -> None:
        """Note a new condition and its moment."""
        self.condition, self.since = condition, time.time()

    def as_part(self) -> Part:
        return Part(
            name=self.name,
            condition=self.condition,
            process=self.process,
            since=self.since,
            restarts=self.restarts,
            ready_after_s=self.ready_after_s,
            fault=self.fault,
        )


class Supervisor:
    """Runs the parts of one stack until it is told to stop."""

    def __init__(self, settings: Settings, prefect_port: int, mlflow_port: int, pools: tuple[str, ...]) -> None:
        self._settings = settings
        self._started = time.time()
        self._parts = {name: Supervised(name) for name in part_names(pools)}
        self._stopping = False
        self._state = State(
            mark=uuid.uuid4().hex,
            supervisor=Recorded.of(os.getpid()),
            started_at=self._started,
            prefect_port=prefect_port,
            mlflow_port=mlflow_port,
            parts=tuple(part.as_part() for part in self._parts.values()),
        )

    def run(self) -> None:
        """Supervise until SIGTERM or SIGINT; every process has ended when this returns."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self._settings.stack.joinpath("logs").mkdir(parents=True, exist_ok=True)
        try:
            while not self._stopping:
                for part in self._parts.values():
                    self._look_at(part)
                self._tell()
                time.sleep(LOOK_S)
        finally:
            self._tell()
            end_parts(self._state)
            for part in self._parts.values():
                if part.child is not None:
                    part.child.wait(10)
            forget_state(self._settings)

    def _stop(self, _signal: int, _frame: object) -> None:
        self._stopping = True

    def _tell(self) -> None:
        parts = tuple(part.as_part() for part in self._parts.values())
        told = State.model_validate({**self._state.model_dump(), "parts": [part.model_dump() for part in parts]})
        if told != self._state or read_state(self._settings) is None:
            self._state = told
            write_state(self._settings, told)

    def _look_at(self, part: Supervised) -> None:
        if part.condition == "done":
            return
        if part.child is None:
            ready = {name for name, other in self._parts.items() if other.condition in {"ready", "done"}}
            if set(needed_by(part.name)) <= ready and time.time() >= part.start_at:
                self._start(part)
            return
        code = part.child.poll()
        if code is not None:
            self._ended(part, code)
        elif part.condition == "starting" and self._answers(part.name):
            part.ready_after_s = round(time.time() - part.since, 1)
            part.become("ready")
        elif part.condition == "ready" and time.time() - part.since > STEADY_S:
            part.pause_s = FIRST_PAUSE_S

    def _start(self, part: Supervised) -> None:
        command = describe_part(part.name, self._settings, self._state, dict(os.environ))
        path = log_of(self._settings, part.name)
        if path.is_file() and path.stat().st_size > LONGEST_LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        with path.open("ab") as log:
            part.child = subprocess.Popen(
                command.arguments,
                env=command.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._settings.stack,
                start_new_session=True,  # Ctrl-C at a supervisor in the foreground is for us to pass on
            )
        with suppress(psutil.NoSuchProcess):
            part.process = Recorded.of(part.child.pid)
        part.become("starting")

    def _ended(self, part: Supervised, code: int) -> None:
        assert part.child is not None
        self._kill_group(part.child.pid)
        part.child = part.process = None
        if part.name == DEPLOY and code == 0:
            part.ready_after_s, part.fault = round(time.time() - part.since, 1), None
            part.become("done")
            return
        part.restarts += 1
        part.fault = f"ended with exit code {code}"
        part.start_at = time.time() + part.pause_s
        part.pause_s = min(2 * part.pause_s, LONGEST_PAUSE_S)
        part.become("down")

    def _kill_group(self, leader: int) -> None:
        """What a server that died has started, and would keep its port."""
        group = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == leader:
                    group.append(process)
        kill_processes(group)

    def _answers(self, name: str) -> bool:
        if name == DEPLOY:
            return False
        if name in SERVERS:
            url = f"{self._state.prefect_url}/api/health" if name == "prefect" else f"{self._state.mlflow_url}/health"
            return ask(url, patience_s=ANSWER_S).is_good
        pool = name.removeprefix("worker-")
        answer = ask(
            f"{self._state.prefect_url}/api/work_pools/{pool}/workers/filter",
            {},
            credentials=credentials_of(without_server_secrets(os.environ), "prefect"),
            patience_s=ANSWER_S,
        )
        started = datetime.fromtimestamp(self._parts[name].since, UTC)
        return answer.is_good and any(
            worker["status"] == "ONLINE" and datetime.fromisoformat(worker["last_heartbeat_time"]) > started
            for worker in answer.content
        )


def supervise(prefect_port: int, mlflow_port: int, pools: tuple[str, ...]) -> None:
    """Run a stack until SIGTERM or SIGINT. Raises ``RuntimeError`` when another supervisor has this home."""
    settings = Settings()
    prepare_environment(settings)
    settings.stack.mkdir(parents=True, exist_ok=True)
    lock = FileLock(settings.stack / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(f"a stack is running already below {settings.home.absolute()}: see 'proxyrob status'") from None
    with lock:
        Supervisor(settings, prefect_port, mlflow_port, pools).run()


if __name__ == "__main__":
    supervise(int(sys.argv[1]), int(sys.argv[2]), tuple(sys.argv[3:]))
