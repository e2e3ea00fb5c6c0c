"""Who is champion: one change at a time, on the record, and taken back when the figure falls."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows.records import champions
from flows.records.champions import claim_decision, read_history
from flows.records.registry import find_registered_champion, judge_champion, register_model
from proxyrob.compare import compare_attacked_again
from proxyrob.evaluate import read_verdicts
from tests.e2e.conftest import NAME, Record
from tests.e2e.test_registry import break_all, succeed

CONTENDER = """\
import sys, time
from pathlib import Path
from mlflow import MlflowClient
from flows.records.champions import claim_decision, find_champion
uri, number, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
client = MlflowClient(uri, uri)
client.search_registered_models()
(folder / f"ready-{number}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
with claim_decision(client, "digits-linf") as claim:
    seen = find_champion(client, "digits-linf").version
    time.sleep(1.0)  # long enough for the other to look, if it could
    if int(seen) == 1:
        claim.promote(number, f"compared with version {seen}")
"""


def test_history_says_who_was_champion_and_why(record: Record, tmp_path: Path) -> None:
    """A promotion stands in the history with what it was decided on; a second registration of the same adds nothing."""
    client = record.tracker.client
    before = read_history(client, NAME)
    plan = succeed(record.plan, tmp_path / "equal", read_verdicts(record.plan.variants[record.plan.released].evaluate)[0])
    plan = dataclasses.replace(plan, config=plan.config.replace(gate={"margin": 0.2}))
    found = register_model(plan, record.tracker, record.run_id)
    assert found.decision.verdict == "PASS"
    register_model(plan, record.tracker, record.run_id)
    (change,) = read_history(client, NAME)[len(before) :]
    assert (change.event, change.version, change.previous) == ("promoted", found.version, 1)
    assert "Robust accuracy against champion (version 1)" in change.reason


def test_a_champion_that_falls_is_withdrawn(record: Record, tmp_path: Path) -> None:
    """Attacked again and broken throughout, the champion loses its alias; the reason stands on version and history."""
    champion = find_registered_champion(record.tracker, NAME)
    assert champion is not None
    broken = succeed(record.plan, tmp_path / "broken", break_all(record.plan))
    found = compare_attacked_again(champion.verdicts, [read_verdicts(broken.variants[broken.released].evaluate)], margin=0.02)
    assert found.verdict == "FAIL"
    assert judge_champion(record.tracker, champion, found, "it fell")
    assert "champion" not in record.aliases()
    version = record.tracker.client.get_model_version(NAME, "1")
    assert version.tags["champion.withdrawn"] == "it fell"
    assert (version.description or "").startswith("**No longer champion:** it fell\n\nGate ")
    assert read_history(record.tracker.client, NAME)[-1].event == "withdrawn"
    assert find_registered_champion(record.tracker, NAME) is None
    assert not judge_champion(record.tracker, champion, found, "again"), "it is champion no longer"


def test_a_champion_that_holds_stays(record: Record) -> None:
    """Attacked again with the same verdicts the champion keeps its alias, and the version says that it was attacked."""
    champion = find_registered_champion(record.tracker, NAME)
    assert champion is not None
    found = compare_attacked_again(champion.verdicts, [champion.verdicts], margin=0.2)
    assert not judge_champion(record.tracker, champion, found, "it holds")
    assert record.aliases()["champion"] == "1"
    assert '"verdict":"PASS"' in record.tracker.client.get_model_version(NAME, "1").tags["attacked-again"]


def test_one_decision_at_a_time(record: Record) -> None:
    """While a claim is held another waits; afterwards it gets it, and nothing is left in the registry."""
    client, got = record.tracker.client, threading.Event()

    def wait() -> None:
        with claim_decision(client, NAME):
            got.set()

    with claim_decision(client, NAME):
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not got.wait(1.0)
    waiting.join(20)
    assert got.is_set()
    assert [model.name for model in client.search_registered_models()] == [NAME]


def test_an_abandoned_claim_is_taken_over(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim of a process that died is cleared when it is old; whoever had it cannot promote any more."""
    client = record.tracker.client
    with claim_decision(client, NAME) as old:
        monkeypatch.setattr(champions, "ABANDONED_AFTER_S", 0.0)
        with claim_decision(client, NAME) as claim:
            with pytest.raises(RuntimeError, match="another process has taken over the decision on digits-linf"):
                old.promote(1, "too late")
            assert claim.withdraw(1, "it may")
    assert "champion" not in record.aliases()


@pytest.mark.slow
def test_two_promotions_cannot_both_win(record: Record, tmp_path: Path) -> None:
    """Two processes that see version 1 as champion at the same moment: the second one is compared with what the first left."""
    plans = [succeed(record.plan, tmp_path / str(k), break_all(record.plan)) for k in range(2)]
    for k, plan in enumerate(plans):
        export = dataclasses.replace(plan.export, digest=str(k) * 64)
        export.record_path.write_text(export.record_path.read_text().replace(plan.export.digest, export.digest))
        register_model(dataclasses.replace(plan, export=export), record.tracker, record.run_id)
    before = read_history(record.tracker.client, NAME)
    commands = [[sys.executable, "-c", CONTENDER, record.tracker.uri, number, str(tmp_path)] for number in ("2", "3")]
    contenders = [subprocess.Popen(command, env=dict(os.environ)) for command in commands]
    while not all((tmp_path / f"ready-{number}").exists() for number in (2, 3)):
        assert all(contender.poll() is None for contender in contenders)
        time.sleep(0.1)
    (tmp_path / "go").touch()
    assert [contender.wait(120) for contender in contenders] == [0, 0]
    changes = read_history(record.tracker.client, NAME)[len(before) :]
    assert [(change.event, change.previous) for change in changes] == [("promoted", 1)]
    assert int(record.aliases()["champion"]) == changes[0].version
