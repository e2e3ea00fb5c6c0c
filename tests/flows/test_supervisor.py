"""The supervisor, with small programs in place of servers."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flows.settings import Settings
from flows.stack import state as state_module
from flows.stack.processes import MARK, Recorded, end_processes, find_marked
from flows.stack.state import State, end_parts, forget_state, read_state

STACK = """\
import sys
from flows.stack import state, supervisor
from flows.stack.processes import MARK
from flows.stack.services import Command

PROGRAM = '''
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"])
time.sleep(600)
'''

def describe(name, settings, state, given):
    program = "pass" if name == "deploy" else PROGRAM
    return Command((sys.executable, "-c", program), {**given, MARK: state.mark})

supervisor.describe_part = describe
supervisor.Supervisor._answers = lambda self, name: name != "deploy"
supervisor.FIRST_PAUSE_S = 0.2
supervisor.LOOK_S = 0.05
state.RUNS_END_S = state.WORKERS_END_S = state.SERVERS_END_S = 1.0
supervisor.supervise(1, 2, ("cpu",))
"""


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Settings, subprocess.Popen[bytes]]:
    """A stack of small programs, each with a child that ignores SIGTERM, all of them up."""
    monkeypatch.setenv("PROXYROB_HOME", str(tmp_path))
    settings = Settings()
    process = subprocess.Popen([sys.executable, "-c", STACK])
    _until(lambda: (state := read_state(settings)) is not None and state.is_up)
    return settings, process


def _until(true: Callable[[], bool], patience_s: float = 30.0) -> None:
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _state(settings: Settings) -> State:
    state = read_state(settings)
    assert state is not None
    return state


def test_what_dies_is_started_again_and_sigterm_ends_all(stack: tuple[Settings, subprocess.Popen[bytes]]) -> None:
    """A killed server comes back, without the child that the first one left; SIGTERM leaves no process and no state."""
    settings, process = stack
    first = next(part for part in _state(settings).parts if part.name == "mlflow")
    assert first.process is not None
    running = first.process.find()
    assert running is not None
    (orphan,) = running.children()
    running.kill()
    _until(lambda: _state(settings).is_up and _state(settings).parts[1].restarts == 1)
    again = _state(settings).parts[1]
    assert again.process is not None
    assert again.process != first.process
    assert again.fault == "ended with exit code -9"
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    mark = _state(settings).mark
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert read_state(settings) is None
    assert find_marked(mark) == []


def test_what_a_dead_supervisor_left_is_ended(
    stack: tuple[Settings, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGKILL the others go on; they are found by the record and by their mark, and ended, children too."""
    settings, process = stack
    process.kill()
    process.wait()
    state = _state(settings)
    assert state.supervisor.find() is None
    assert not state.is_up
    assert len(find_marked(state.mark)) == 6
    for name in ("RUNS_END_S", "WORKERS_END_S", "SERVERS_END_S"):
        monkeypatch.setattr(state_module, name, 1.0)
    assert end_parts(state) == 2, "what the servers started ignores SIGTERM; what the worker started is killed with it"
    assert find_marked(state.mark) == []
    forget_state(settings)
    assert read_state(settings) is None


def test_a_process_with_the_number_of_another_is_not_ours() -> None:
    """A recorded number that was given to another process since finds nothing, so nothing foreign is ended."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as foreign:
        ours = Recorded.of(foreign.pid)
        assert Recorded(pid=ours.pid, created_at=ours.created_at - 10).find() is None
        found = ours.find()
        assert found is not None
        end_processes([found], 5.0)
        assert ours.find() is None


def test_a_mark_is_inherited() -> None:
    """Whatever a marked process starts is found, though nobody recorded it."""
    command = [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"]
    with subprocess.Popen(command, env={MARK: "inherited"}, stdin=subprocess.PIPE) as process:
        _until(lambda: len(find_marked("inherited")) == 2)
        assert process.stdin is not None
        process.stdin.close()
    assert find_marked("inherited") == []


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    """A state that cannot be read is an error with what to do, never an empty stack."""
    settings = Settings(home=tmp_path)
    settings.stack.mkdir()
    (settings.stack / "state.json").write_text('{"mark": "m"}')
    with pytest.raises(ValueError, match="was written by another version of this program"):
        read_state(settings)
