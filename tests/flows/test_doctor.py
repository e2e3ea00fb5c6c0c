"""What the doctor finds, with a small server in place of Prefect's and MLflow's."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prefect import __version__ as prefect_version

from flows.settings import Settings, prepare_environment
from flows.stack import doctor
from flows.stack.doctor import Finding, Surroundings, check_data, check_room, check_runs, check_servers, check_slots, examine

OLD = {"timestamp": "2020-01-01T00:00:00Z"}


class Pretended:
    """Answers paths with what a test says, as ``(status, content)``."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Any]] = {}
        pretended = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, content = pretended.answers.get(self.path, (404, None))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def log_message(self, format: str, *arguments: object) -> None: ...  # noqa: A002  (the base class's name)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def pretended() -> Iterator[Pretended]:
    """A server that says what the test wants."""
    one = Pretended()
    threading.Thread(target=one.server.serve_forever, args=(0.02,), daemon=True).start()
    yield one
    one.server.shutdown()
    one.server.server_close()


def _around(home: Path, url: str) -> Surroundings:
    settings = Settings(home=home, tracking_uri=url)
    prepare_environment(settings, {})
    return Surroundings(settings, {"PREFECT_API_URL": f"{url}/api"}, None)


def _problems(found: Iterator[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.outcome == "problem"]


@pytest.mark.parametrize(
    ("prefect", "mlflow", "expected"),
    [
        ((200, prefect_version), (401, None), ["MLFLOW_TRACKING_USERNAME"]),
        ((401, None), (403, "Invalid Host header"), ["PREFECT_API_AUTH_STRING", "MLFLOW_SERVER_ALLOWED_HOSTS"]),
        ((200, "2.0.1"), (500, None), ["requirements.lock", "PROXYROB_TRACKING_URI"]),
    ],
)
def test_servers_that_refuse_or_do_not_fit(
    tmp_path: Path, pretended: Pretended, prefect: tuple[int, Any], mlflow: tuple[int, Any], expected: list[str]
) -> None:
    """Wrong credentials, an unknown host name and another version are told apart, each with what to do."""
    pretended.answers |= {"/api/admin/version": prefect, "/version": mlflow}
    found = _problems(check_servers(_around(tmp_path, pretended.url)))
    assert len(found) == len(expected)
    assert all(remedy in finding.remedy for remedy, finding in zip(expected, found, strict=True))


def test_servers_that_do_not_answer(tmp_path: Path, pretended: Pretended) -> None:
    """A server that is not there is a problem, never an exception."""
    pretended.server.server_close()
    found = _problems(check_servers(_around(tmp_path, "http://127.0.0.1:9")))
    assert ["does not answer" in finding.finding for finding in found] == [True, True]


def test_a_stuck_slot_is_named_with_its_remedy(tmp_path: Path, pretended: Pretended) -> None:
    """A deployment's slot without a run that goes on is a problem; one with a run, or another kind of limit, is none."""
    limits = [{"name": "deployment:a", "active_slots": 1}, {"name": "tag:gpu", "active_slots": 1}]
    pretended.answers |= {"/api/v2/concurrency_limits/filter": (200, limits), "/api/flow_runs/count": (200, 0)}
    (found,) = _problems(check_slots(_around(tmp_path, pretended.url)))
    assert found.remedy == "prefect global-concurrency-limit update deployment:a --active-slots 0"
    pretended.answers["/api/flow_runs/count"] = (200, 1)
    assert not _problems(check_slots(_around(tmp_path, pretended.url)))


def test_a_run_without_sign_of_life_is_named(tmp_path: Path, pretended: Pretended) -> None:
    """A run that is Running for long without a heartbeat is a problem, one with a heartbeat is none."""
    run = {"id": "r", "name": "digits", "state": OLD}
    pretended.answers |= {"/api/flow_runs/filter": (200, [run]), "/api/events/filter": (200, {"events": []})}
    (found,) = _problems(check_runs(_around(tmp_path, pretended.url)))
    assert found.remedy.startswith("prefect flow-run delete r")
    pretended.answers["/api/events/filter"] = (200, {"events": [{}]})
    assert not _problems(check_runs(_around(tmp_path, pretended.url)))


def test_a_full_disk_is_a_problem(tmp_path: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little room is said before a run ends in the middle."""
    around = _around(tmp_path, pretended.url)
    assert not _problems(check_room(around))
    monkeypatch.setattr(doctor, "LEAST_ROOM_GB", 1e9)
    assert "free some space" in _problems(check_room(around))[0].remedy


def test_data_has_to_be_writable(tmp_path: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place for data is written to, read and cleaned; S3 without credentials is a problem with the variables to check."""
    around = _around(tmp_path, pretended.url)
    folder = tmp_path / "data"
    local = Surroundings(around.settings.replace_data(str(folder)), {}, None)
    assert not _problems(check_data(local))
    assert not [path for path in folder.rglob("*") if path.is_file()]
    monkeypatch.setenv("AWS_ENDPOINT_URL", pretended.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    away = Surroundings(around.settings.replace_data("s3://bucket/prefix"), {}, None)
    assert "AWS_ACCESS_KEY_ID" in _problems(check_data(away))[0].remedy


def test_without_a_stack_nothing_is_wrong(tmp_path: Path) -> None:
    """Embedded use needs no server: the doctor says so and finds no problem."""
    settings = Settings(home=tmp_path)
    prepare_environment(settings, {})
    found = list(examine(settings, {}))
    assert [finding.subject for finding in found if finding.outcome == "problem"] == []
    assert any("none is running" in finding.finding for finding in found)
