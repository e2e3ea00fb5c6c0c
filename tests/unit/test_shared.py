"""Units of work that many workers share: each is done once, whoever is killed, and belongs to the work it was done for."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from proxyrob.errors import CheckpointMismatch, DataIntegrityError
from proxyrob.storage import DataPlace, claims, open_store
from proxyrob.storage.claims import Claims
from proxyrob.storage.shared import EndedElsewhere, SharedTables
from tests import sharing
from tests.toys import damage, files_below


def _table(value: int) -> pa.Table:
    return pa.table({"value": [value]})


def _shared(folder: Path, **about: object) -> SharedTables:
    return SharedTables(DataPlace.of(folder), {"seed": 3, "model": "abc", **about}, lambda: False)


def _run_workers(folder: Path, workers: int, killed: int) -> None:
    command = [sys.executable, "-m", "tests.sharing", str(folder), str(workers), str(killed)]
    done = subprocess.run(
        command, cwd=Path(sharing.__file__).parents[1], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_many_workers_do_every_unit_once_though_some_are_killed(tmp_path: Path) -> None:
    """Of five workers two are killed in the middle of a unit: the others take these units over at once, no unit is finished
    twice, and one worker concludes."""
    before = time.monotonic()
    _run_workers(tmp_path, 5, 2)
    assert time.monotonic() - before < claims.LEASE_S, "a claim of a dead process on this machine needs no waiting"
    assert sorted((tmp_path / "done").read_text().split()) == sharing.NAMES
    assert (tmp_path / "concluded").read_text() == "once\n"
    assert (tmp_path / "conclusion").read_text() == str([k * k for k in range(12)])


def test_units_that_are_there_are_not_done_again(tmp_path: Path) -> None:
    """Killed after two units, the third is done alone; ``look`` is told which are there."""
    done: list[str] = []
    looked: list[set[str]] = []

    def compute(name: str) -> pa.Table:
        done.append(name)
        return _table(len(done))

    _shared(tmp_path).tabulate(["a", "b"], compute)
    shared = _shared(tmp_path)
    shared.tabulate(["a", "b", "c"], compute, lambda there: looked.append(there) is not None)
    assert done == ["a", "b", "c"]
    assert looked == [{"a", "b"}, {"a", "b", "c"}]
    assert [shared.read(name, ["value"])["value"][0].as_py() for name in done] == [1, 2, 3]


def test_units_that_are_enough_end_the_work(tmp_path: Path) -> None:
    """Where ``look`` says that the units there are enough, no other is begun."""
    done: list[str] = []
    _shared(tmp_path).tabulate(["a", "b", "c"], lambda name: done.append(name) or _table(0), lambda there: len(there) == 2)
    assert done == ["a", "b"]


def test_a_unit_that_fails_is_given_back(tmp_path: Path) -> None:
    """What a unit raises is raised, nothing of it is kept, and the next worker may begin it."""
    shared = _shared(tmp_path)
    with pytest.raises(ZeroDivisionError):
        shared.tabulate(["a"], lambda name: _table(1 // 0))
    assert files_below(tmp_path) == {"binding.json"}
    shared.tabulate(["a"], lambda name: _table(1))
    assert shared.read("a").to_pydict() == {"value": [1]}


def test_other_conditions_are_refused_by_name(tmp_path: Path) -> None:
    """Work that was begun with another seed and model is not gone on with; the message says what differs."""
    _shared(tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"unfinished work under other conditions .*seed: 3 and 4"):
        _shared(tmp_path, seed=4)
    _shared(tmp_path)


def test_a_unit_of_other_work_is_refused(tmp_path: Path) -> None:
    """A unit carries the hash of its conditions: one that was copied from elsewhere is not believed."""
    _shared(tmp_path / "one").tabulate(["a"], lambda name: _table(1))
    other = _shared(tmp_path / "other", seed=4)
    (tmp_path / "other" / "a.parquet").write_bytes((tmp_path / "one" / "a.parquet").read_bytes())
    with pytest.raises(CheckpointMismatch, match=r"a\.parquet was found under other conditions"):
        other.read("a")


def test_a_damaged_unit_is_refused(tmp_path: Path) -> None:
    """The message names the file and the remedy."""
    shared = _shared(tmp_path)
    shared.tabulate(["a"], lambda name: _table(1))
    damage(tmp_path / "a.parquet")
    with pytest.raises(DataIntegrityError, match=r"a\.parquet cannot be read .*delete it"):
        shared.read("a")


def test_work_that_ended_elsewhere_is_not_begun_again(tmp_path: Path) -> None:
    """When another worker has finished everything and cleared the units away, nothing is done anew."""
    shared = SharedTables(DataPlace.of(tmp_path), {}, lambda: True)
    with pytest.raises(EndedElsewhere):
        shared.tabulate(["a"], lambda name: pytest.fail("begun"))
    with pytest.raises(EndedElsewhere):
        shared.read("a")
    with pytest.raises(EndedElsewhere):
        shared.conclude(lambda: pytest.fail("concluded"))


# Claims


def test_a_claim_is_held_by_one(tmp_path: Path) -> None:
    """Another worker cannot have it, nor the same one twice, until it is given back; nothing is left behind."""
    one, other = Claims(open_store(tmp_path)), Claims(open_store(tmp_path))
    with one.hold("a") as first, other.hold("a") as second, one.hold("a") as third, other.hold("b") as elsewhere:
        assert (first, second, third, elsewhere) == (True, False, False, True)
    with other.hold("a") as later:
        assert later
    assert files_below(tmp_path) == set()


def _leave(folder: Path, process: int, machine: str | None = None, sign: bytes | None = None, holder: str = "x") -> None:
    """A claim on ``a`` that somebody holds."""
    store = open_store(folder)
    about = {"machine": machine or claims._machine(), "process": process, "token": holder}
    store.write("claims/a-000007.json", json.dumps(about).encode(), replace=True)
    if sign is not None:
        store.write("claims/a-000007.alive", sign, replace=True)


def _is_free(folder: Path, by: Claims | None = None) -> bool:
    with (by or Claims(open_store(folder))).hold("a") as is_mine:
        return is_mine


def test_a_claim_of_an_ended_process_is_lost_at_once(tmp_path: Path) -> None:
    """Of one on this machine that is gone, also when its number is this process's own by now; not of one that runs."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    _leave(tmp_path, gone.pid)
    assert _is_free(tmp_path)
    _leave(tmp_path, os.getpid())
    assert _is_free(tmp_path)
    _leave(tmp_path, os.getppid())
    assert not _is_free(tmp_path)


def test_a_claim_without_a_sign_of_life_is_lost_after_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another machine's worker only its signs of life are known: as long as they change it holds its claim."""
    monkeypatch.setattr(claims, "LEASE_S", 0.05)
    waiting = Claims(open_store(tmp_path))
    for beat in range(3):
        _leave(tmp_path, 1, "elsewhere", b"%d" % beat)
        assert not _is_free(tmp_path, waiting)
        time.sleep(0.06)
    assert not _is_free(tmp_path, Claims(open_store(tmp_path))), "whoever comes later has to wait himself"
    assert _is_free(tmp_path, waiting)
    assert files_below(tmp_path) == set(), "who takes a lost claim over leaves nothing of it"
    _leave(tmp_path, 1, "elsewhere", b"2", holder="y")
    assert not _is_free(tmp_path, waiting), "the next one of that name is another claim, though it looks the same"


def test_the_holder_of_a_claim_shows_that_it_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the lease, seen from elsewhere."""
    monkeypatch.setattr(claims, "LEASE_S", 0.5)
    monkeypatch.setattr(claims, "BEAT_S", 0.02)
    with Claims(open_store(tmp_path)).hold("a") as is_mine:
        assert is_mine
        monkeypatch.setattr(claims, "_machine", lambda: "elsewhere")
        waiting, end = Claims(open_store(tmp_path)), time.monotonic() + 1.0
        while time.monotonic() < end:
            assert not _is_free(tmp_path, waiting)
            time.sleep(0.05)


def test_of_many_that_find_a_lost_claim_one_gets_it(tmp_path: Path) -> None:
    """Ten threads take over the claim of a dead process at once: one of them holds it."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    _leave(tmp_path, gone.pid)
    barrier, held, results = threading.Barrier(10), threading.Barrier(10), []

    def take() -> None:
        barrier.wait()
        with Claims(open_store(tmp_path)).hold("a") as is_mine:
            results.append(is_mine)
            held.wait()  # everybody has tried before anybody gives it back

    threads = [threading.Thread(target=take) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 9 + [True]
