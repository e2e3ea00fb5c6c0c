"""Checkpoints where machines end and stores fail: copies in a store, full disks, kills at random moments."""

import errno
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from proxyrob.errors import CheckpointMismatch, DataIntegrityError, SourceUnavailable
from proxyrob.storage import DataPlace, Stage, s3
from proxyrob.storage.checkpoints import Checkpoints
from proxyrob.storage.store import Store, open_store
from tests.s3_faults import Fault, FaultyProxy
from tests.storage.conftest import forget_client
from tests.toys import damage, files_below

DIGEST = "0123456789abcdef" * 4
BELOW = "checkpoints/train/0123456789abcdef"


def _stage(machine: Path, **configuration: object) -> Stage:
    """The same stage, in the folder of some machine."""
    return Stage("train", DIGEST, machine / "train", dict(configuration))


def _model(value: float, size: int = 3) -> nn.Linear:
    """A model whose weights all have one value."""
    model = nn.Linear(size, size)
    for weight in model.parameters():
        nn.init.constant_(weight, value)
    return model


def _save(stage: Stage, place: DataPlace | None, *steps: int) -> None:
    with Checkpoints(stage, place) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"model": _model(step)}, [{"step": step, "loss": 1 / step}])


def _load(stage: Stage, place: DataPlace | None = None, size: int = 3) -> int:
    """The newest step, after a look at the weights and the history that belong to it."""
    model = _model(-1.0, size)
    with Checkpoints(stage, place) as checkpoints:
        step, history = checkpoints.load({"model": model}, "cpu")
    assert all(bool((weight == (step or -1)).all()) for weight in model.parameters())
    assert history == (({"step": step, "loss": 1 / step},) if step and size == 3 else ())
    return step


def _names(*steps: int) -> set[str]:
    return {f"checkpoint-{step:08d}.{kind}" for step in steps for kind in ("json", "pt")}


def _keys(store: Store) -> set[str]:
    return {info.key.removeprefix(f"{BELOW}/") for info in store.list()}


@pytest.fixture
def place(store: Store) -> DataPlace:
    """An empty place of each kind."""
    return DataPlace(store.uri)


# Copies in a store


def test_another_machine_goes_on_from_the_copy(store: Store, place: DataPlace, tmp_path: Path) -> None:
    """The newest checkpoints lie in the store; a machine that has none takes the newest from there and has it then."""
    here, there = _stage(tmp_path / "here"), _stage(tmp_path / "there")
    _save(here, place, 10, 20, 30)
    assert {info.key for info in store.list()} == {f"{BELOW}/{name}" for name in _names(20, 30)}
    assert _load(there, place) == 30
    assert files_below(there.scratch) == _names(30)
    assert _load(there) == 30, "the copy is a checkpoint of that machine, whether or not the store answers"
    _save(there, place, 40)
    assert (_keys(store), files_below(there.scratch)) == (_names(30, 40), _names(30, 40))
    assert _load(here, place) == 40


def test_the_newest_of_both_places_is_taken(store: Store, place: DataPlace, tmp_path: Path) -> None:
    """What this machine has counts as much as what the store has; of two for one step this machine's is read."""
    here = _stage(tmp_path / "here")
    _save(here, place, 10)
    _save(here, None, 20)
    assert _load(here, place) == 20
    _save(_stage(tmp_path / "there"), place, 20)
    store.write(f"{BELOW}/checkpoint-00000020.pt", b"damaged", replace=True)
    assert _load(here, place) == 20


@pytest.mark.parametrize(
    ("store", "how"),
    [("folder", "altered"), ("folder", "truncated"), ("folder", "missing"), ("s3", "altered")],
    indirect=["store"],
)
def test_a_damaged_copy_is_refused(store: Store, place: DataPlace, tmp_path: Path, how: str) -> None:
    """It is named with its hash and what to delete, no older one is taken instead, and nothing of it stays here."""
    here, there = _stage(tmp_path / "here"), _stage(tmp_path / "there")
    _save(here, place, 10, 20)
    key = f"{BELOW}/checkpoint-00000020.pt"
    content = (here.scratch / "checkpoint-00000020.pt").read_bytes()
    if how == "missing":
        store.delete(key)
    else:
        store.write(key, content[:-1] if how == "truncated" else b"x" * len(content), replace=True)
    sha256 = json.loads((here.scratch / "checkpoint-00000020.json").read_text())["sha256"]
    with pytest.raises(DataIntegrityError) as error:
        _load(there, place)
    got = {"altered": "other bytes", "truncated": f"{len(content) - 1} bytes", "missing": "nothing"}[how]
    for part in (
        f"{store.uri}/{key} is damaged: expected {len(content)} bytes with sha256 {sha256}, got {got}; ",
        f"delete checkpoint-00000020.json and checkpoint-00000020.pt in {store.uri}/{BELOW} and run again: "
        "this stage then goes on from step 10",
    ):
        assert part in str(error.value)
    assert files_below(there.scratch) == set()
    store.delete(f"{BELOW}/checkpoint-00000020.json")
    assert _load(there, place) == 10


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_a_damaged_checkpoint_is_not_replaced_by_its_copy_unasked(store: Store, place: DataPlace, tmp_path: Path) -> None:
    """The message says that the copy would be used once the damaged file is deleted, and then it is."""
    here = _stage(tmp_path / "here")
    _save(here, place, 10, 20)
    damage(here.scratch / "checkpoint-00000020.pt")
    with pytest.raises(DataIntegrityError, match=f"pt in {here.scratch} and run again: this stage then goes on from step 20"):
        _load(here, place)
    for name in _names(20):
        (here.scratch / name).unlink()
    assert _load(here, place) == 20


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_a_copy_of_another_configuration_is_refused(store: Store, place: DataPlace, tmp_path: Path) -> None:
    """The record is compared before anything is fetched, and both places are named."""
    _save(_stage(tmp_path / "here", batch_size=128), place, 10)
    key = f"{BELOW}/checkpoint-00000010.json"
    store.write(key, store.read(key).replace(DIGEST.encode(), b"f" * 64), replace=True)
    there = _stage(tmp_path / "there", batch_size=256)
    with pytest.raises(CheckpointMismatch) as error:
        _load(there, place)
    for part in (f"{store.uri}/{key}", "batch_size: 128 and 256", f"delete {there.scratch} and {store.uri}/{BELOW} and run"):
        assert part in str(error.value)
    assert files_below(there.scratch) == set()


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_what_a_kill_left_in_the_store_counts_for_nothing(store: Store, place: DataPlace, tmp_path: Path) -> None:
    """A file without its record is not loaded, and goes when a later checkpoint is there."""
    here = _stage(tmp_path / "here")
    _save(here, place, 10)
    store.write(f"{BELOW}/checkpoint-00000020.pt", b"whole, and its record was never written")
    assert _load(_stage(tmp_path / "there"), place) == 10
    _save(here, place, 30)
    assert _keys(store) == _names(10, 30)


def test_a_finished_stage_leaves_no_copies(store: Store, place: DataPlace, tmp_path: Path) -> None:
    """Clearing removes its checkpoints from both places, and nothing else from the store."""
    here = _stage(tmp_path / "here")
    store.write("checkpoints/train/other/checkpoint-00000010.pt", b"of another stage")
    store.write(f"{BELOW}/notes.txt", b"of somebody")
    with Checkpoints(here, place) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, {"model": _model(step)})
        checkpoints.clear()
    assert files_below(here.folder) == set()
    assert {info.key for info in store.list()} == {"checkpoints/train/other/checkpoint-00000010.pt", f"{BELOW}/notes.txt"}


# A store that does not answer


@pytest.fixture
def hurried(s3_environment: pytest.MonkeyPatch, faulty: FaultyProxy) -> Iterator[FaultyProxy]:
    """A proxy before the server, and a client that asks only once."""
    s3_environment.setattr(s3, "ATTEMPTS", 1)
    forget_client()
    yield faulty
    faulty.faults = []


def test_a_store_that_does_not_answer_stops_no_work(hurried: FaultyProxy, s3_store: Store, tmp_path: Path) -> None:
    """The work goes on with checkpoints of its own; the store gets the next one after it is back, and all is well."""
    here, place = _stage(tmp_path / "here"), DataPlace(s3_store.uri)
    with Checkpoints(here, place) as checkpoints:
        for step in (10, 20):
            hurried.faults = [Fault("refuse", "PUT", times=100)]
            checkpoints.save(step, {"model": _model(step)}, wait=True)
            assert hurried.faults[0].times < 100
        hurried.faults = []
        assert (files_below(here.scratch), _keys(s3_store)) == (_names(10, 20), set())
        checkpoints.save(30, {"model": _model(30)}, wait=True)
        assert (files_below(here.scratch), _keys(s3_store)) == (_names(20, 30), _names(30))


def test_a_copy_is_sent_at_the_end_at_last(hurried: FaultyProxy, s3_store: Store, tmp_path: Path) -> None:
    """What could not be sent is tried once more when the block ends."""
    with Checkpoints(_stage(tmp_path / "here"), DataPlace(s3_store.uri)) as checkpoints:
        hurried.faults = [Fault("refuse", "PUT", times=100)]
        checkpoints.save(10, {"model": _model(10)}, wait=True)
        hurried.faults = []
    assert _keys(s3_store) == _names(10)


def test_a_copy_that_is_missing_at_the_end_is_told(hurried: FaultyProxy, s3_store: Store, tmp_path: Path) -> None:
    """Nobody relies on a copy that is not there: the end of the block raises what the store said, once; the work itself can
    go on from its own checkpoint. An error of the work comes first."""
    here, place = _stage(tmp_path / "here"), DataPlace(s3_store.uri)
    hurried.faults = [Fault("refuse", "PUT", times=100)]
    with pytest.raises(SourceUnavailable, match=r"checkpoint-00000010\.pt") as raised:
        _save(here, place, 10)
    assert raised.value.__notes__ == ["the newest checkpoint of stage 'train' is whole, and on this machine alone"]
    assert _load(here, place) == 10
    checkpoints = Checkpoints(here, place)
    checkpoints.save(20, {"model": _model(20)})
    diverged = ArithmeticError("the loss is nan")
    checkpoints.__exit__(type(diverged), diverged, None)
    (note,) = diverged.__notes__
    assert note.startswith("besides, a checkpoint could not be written: SourceUnavailable(")


def test_a_copy_that_is_sent_again_never_has_the_record_of_another_file(
    hurried: FaultyProxy, s3_store: Store, tmp_path: Path
) -> None:
    """Cut off between file and record, a step that was there before has no copy, and the one before it is taken."""
    here, place = _stage(tmp_path / "here"), DataPlace(s3_store.uri)
    _save(here, place, 10, 20)
    hurried.faults = [Fault("refuse", "PUT", ".json", times=100)]
    checkpoints = Checkpoints(here, place)
    checkpoints.save(20, {"model": _model(99)})
    with pytest.raises(SourceUnavailable):
        checkpoints.__exit__(None, None, None)
    hurried.faults = []
    assert _load(_stage(tmp_path / "there"), place) == 10


def test_a_finished_stage_has_nothing_to_send(hurried: FaultyProxy, s3_store: Store, tmp_path: Path) -> None:
    """A training whose store has refused every copy still finishes."""
    with Checkpoints(_stage(tmp_path / "here"), DataPlace(s3_store.uri)) as checkpoints:
        hurried.faults = [Fault("refuse", "PUT", times=100)]
        checkpoints.save(10, {"model": _model(10)})
        checkpoints.clear()
    assert hurried.faults[0].times == 99, "it was tried once"


def test_a_store_that_does_not_answer_when_work_starts_is_told(hurried: FaultyProxy, tmp_path: Path, s3_store: Store) -> None:
    """Which checkpoint is the newest is then unknown: starting from an older one would be a guess."""
    here = _stage(tmp_path / "here")
    _save(here, None, 10)
    hurried.faults = [Fault("refuse", "GET", times=100)]
    with pytest.raises(SourceUnavailable):
        _load(here, DataPlace(s3_store.uri))


# Full disks and kills


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(tiny_disk: Path) -> None:
    """The error names the file and the remedy rather than torch's writer, nothing half-written stays, and the one before is
    whole."""
    here = _stage(tiny_disk)
    _save(here, None, 10)
    checkpoints = Checkpoints(here)
    checkpoints.save(20, {"model": _model(20, 800)})
    with pytest.raises(OSError, match=r"No space left on device; free space there .*checkpoint-00000020\.pt'") as raised:
        checkpoints.__exit__(None, None, None)
    assert raised.value.errno == errno.ENOSPC
    assert files_below(here.scratch) == _names(10)
    assert _load(here) == 10


def test_a_disk_without_room_for_the_copy_is_told(s3_store: Store, tiny_disk: Path, tmp_path: Path) -> None:
    """A machine that has no room for the checkpoint that lies in the store says so; it does not start anew."""
    here, place = _stage(tmp_path / "here"), DataPlace(s3_store.uri)
    with Checkpoints(here, place) as checkpoints:
        checkpoints.save(20, {"model": _model(20, 800)})
    there = _stage(tiny_disk)
    with pytest.raises(OSError, match=r"No space left on device; free space there .*checkpoint-00000020\.pt'"):
        _load(there, place, 800)
    assert files_below(there.scratch) == set()


SAVER = """
import os, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from proxyrob.storage import DataPlace, Stage
from proxyrob.storage.checkpoints import Checkpoints
torch.set_num_threads(1)
machine, uri, digest, size = sys.argv[1:]
stage = Stage("train", digest, Path(machine) / "train", {})
model = nn.Linear(int(size), int(size))
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        with Checkpoints(stage, DataPlace(uri)) as checkpoints:
            step, _ = checkpoints.load({"model": model}, "cpu")
            while True:
                step += 1
                for weight in model.parameters():
                    nn.init.constant_(weight, step)
                checkpoints.save(step, {"model": model})
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(flush=True)
"""  # each line of input starts one worker, which goes on from its checkpoints, and says after how many seconds it is killed


def _kill_workers(folder: Path, kills: int, seed: int) -> None:
    delays, longest_s, size = random.Random(seed), 0.2, 400  # noqa: S311 - no secret
    last, last_copy = 0, 0
    here, place = _stage(folder / "here"), DataPlace.of(folder / "store")
    command = [sys.executable, "-c", SAVER, folder / "here", place.uri, DIGEST, str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as workers:
        assert workers.stdin is not None
        assert workers.stdout is not None
        for kill in range(3 * kills):
            print(delays.uniform(0.01, longest_s), file=workers.stdin, flush=True)
            assert workers.stdout.readline() == "\n"
            step = _load(here, None, size)
            copy = _load(_stage(folder / f"machine-{kill}"), place, size)
            assert last <= step, "no checkpoint that was whole is lost"
            assert last_copy <= copy <= step, "nor is a copy"
            if step == last:  # killed before it had saved anything: this machine is busy
                longest_s *= 2
            last, last_copy = step, copy
            if kill + 1 >= kills and min(last, last_copy) > 3:
                break
        workers.stdin.close()
    assert min(last, last_copy) > 3, "workers got to save, and to send"
    _save(here, place, last + 1, last + 2)
    expected = _names(last + 1, last + 2)
    assert (files_below(here.scratch), _keys(place.open())) == (expected, expected), (
        "nothing that a kill left is there any more"
    )


def test_the_worker_is_killed(tmp_path: Path) -> None:
    """``kill -9`` at random moments leaves whole checkpoints, here and in the store, that are never older than before; what
    was half-written goes with the next one (in the store after a day: there it could be another machine's)."""
    _kill_workers(tmp_path, kills=6, seed=1)


@pytest.mark.slow
def test_workers_are_killed_for_long(tmp_path: Path) -> None:
    """The same, many times."""
    _kill_workers(tmp_path, kills=150, seed=2)


def test_the_stores_address_is_the_same_on_every_machine(tmp_path: Path) -> None:
    """Only the stage and its digest decide where the copies lie, not the folder that a machine keeps the stage in."""
    place = DataPlace.of(tmp_path / "store")
    _save(_stage(tmp_path / "a" / "deep"), place, 10)
    assert _keys(open_store(place.uri)) == _names(10)
    assert _load(_stage(tmp_path / "b"), place) == 10
