"""Stages as Prefect tasks: retried by cause, cached by digest."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect import flow
from prefect.results import ResultRecord  # pyright: ignore[reportPrivateImportUsage]

from flows.running import stages
from flows.running.display import Display, QuietDisplay
from flows.running.fitting import USUAL
from flows.running.stages import Session, await_stages, open_session, submit_stage
from flows.settings import Settings
from proxyrob.errors import OutOfMemory
from proxyrob.memory import at_most
from proxyrob.storage import Report, Stage
from proxyrob.storage.files import write_bytes
from tests.hostile import MARKER, prefect_result


class Counted(Report):
    """How often a stage's function was called."""

    calls: int


def _count(folder: Path) -> int:
    calls = len(list(folder.glob("call-*"))) + 1
    (folder / f"call-{calls}").touch()
    return calls


def _dies_once(stage: Stage, on_progress: Callable[..., None]) -> Counted:
    calls = _count(stage.folder.parent)
    if calls == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return stage.finish(Counted(calls=calls), [], 0.0)


def _refuses(stage: Stage, on_progress: Callable[..., None]) -> Counted:
    _count(stage.folder.parent)
    raise ValueError("a wrong configuration stays wrong")


def _works(stage: Stage, on_progress: Callable[..., None]) -> Counted:
    return stage.finish(Counted(calls=_count(stage.folder.parent)), [], 0.0)


@flow
def _run_one(function: Any, stage: Any) -> tuple[Any, str | None]:
    future = submit_stage(function, stage, "stage")
    await_stages()
    return future.result(), future.state.name


def _run(
    function: Callable[..., Report],
    tmp_path: Path,
    display: Display = QuietDisplay(),  # noqa: B008  (it keeps nothing)
) -> tuple[Counted, str | None]:
    stage = Stage("stage", "a" * 64, tmp_path / "stage", {})
    with open_session(Session(Settings(home=tmp_path, workers=1), "cpu", display)):
        return _run_one(function, stage)


@pytest.mark.usefixtures("prefect_server")
def test_a_killed_worker_is_retried(tmp_path: Path) -> None:
    """A stage whose process is killed runs again and succeeds."""
    report, _ = _run(_dies_once, tmp_path)
    assert report.calls == 2


@pytest.mark.usefixtures("prefect_server")
def test_a_wrong_configuration_is_not_retried(tmp_path: Path) -> None:
    """What would only fail again is called once, and its own error reaches the caller."""
    with pytest.raises(ValueError, match="a wrong configuration stays wrong"):
        _run(_refuses, tmp_path)
    assert [path.name for path in tmp_path.glob("call-*")] == ["call-1"]


def _has_room_for_half(stage: Stage, on_progress: Callable[..., None]) -> Counted:
    if at_most(USUAL) > USUAL // 2:
        raise OutOfMemory("there is no more memory")
    return _works(stage, on_progress)


class _Screen(QuietDisplay):
    """Keeps what a person at a terminal would see."""

    is_log = False

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.usefixtures("prefect_server")
def test_what_a_stage_notes_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the run's log, on a worker and at a terminal, and there on the screen, too."""
    said = f"memory ran out (there is no more memory): goes on with at most {USUAL // 2} of {USUAL} images at once"
    for folder, display in (("worker", QuietDisplay()), ("terminal", screen := _Screen())):
        caplog.clear()
        with caplog.at_level("WARNING", "prefect"):
            _run(_has_room_for_half, tmp_path / folder, display)
        assert [record.getMessage().endswith(said) for record in caplog.records] == [True]
    assert screen.notes == [f"stage: {said}"]


@pytest.mark.usefixtures("prefect_server")
def test_cached_until_its_files_are_gone(tmp_path: Path) -> None:
    """The second run takes the stored report; when the stage's record is gone, the stage is computed again."""
    first, state = _run(_works, tmp_path)
    assert (first.calls, state) == (1, "Completed")
    second, state = _run(_works, tmp_path)
    assert (second.calls, state) == (1, "Cached")
    (tmp_path / "stage" / "stage.json").unlink()
    third, state = _run(_works, tmp_path)
    assert (third.calls, state) == (2, "Completed")


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("how", ["pickle", "json"])
def test_a_planted_result_is_not_read(how: str, tmp_path: Path) -> None:
    """Where Prefect would keep a stage's result somebody puts a file in Prefect's format, which names a pickle or a function
    to call. Where Prefect reads such a file that runs; a stage's report comes from its record, and nothing does."""
    _run(_works, tmp_path)
    planted = tmp_path / "store" / "stage" / "stage" / "result.json"
    for folder in (tmp_path / "read", tmp_path / "here"):
        folder.mkdir()
        write_bytes(planted, prefect_result(folder, how))
        if folder.name == "read":
            ResultRecord[Any].deserialize(planted.read_bytes())
            assert (folder / MARKER).exists()
    report, state = _run(_works, tmp_path)
    assert (report.calls, state) == (1, "Cached")
    assert not (tmp_path / "here" / MARKER).exists()


def _tells_long(stage: Stage, on_progress: Callable[..., None]) -> Counted:
    for step in range(5):
        on_progress(step, 5)
        time.sleep(0.1)
    return stage.finish(Counted(calls=_count(stage.folder.parent)), [], 0.0)


def test_a_bar_that_cannot_be_shown_fails_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's server answers 500 while its database is away: the bar is shown when it is back, and nobody waits for it."""
    asked: list[float] = []

    def make(progress: float, **_about: str) -> UUID:
        asked.append(progress)
        if len(asked) < 3:
            raise httpx.HTTPStatusError("500", request=httpx.Request("POST", "http://x"), response=httpx.Response(500))
        return UUID(int=1)

    def update(_artifact: UUID, progress: float) -> None:
        asked.append(progress)
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(stages, "UI_INTERVAL_S", 0.1)
    monkeypatch.setattr(stages, "create_progress_artifact", make)
    monkeypatch.setattr(stages, "update_progress_artifact", update)
    report, _ = _run(_tells_long, tmp_path)
    assert report.calls == 1
    assert len(asked) > 3
    assert asked == sorted(asked)
    assert asked[-1] == 80.0
