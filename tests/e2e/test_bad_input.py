"""Bad input: one clear message that says what to do, before any work, with the agreed exit code."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import Finished, Program
from tests.e2e.test_resume import kill_at

WRONG = {
    "unknown preset": (["run", "digit"], "did you mean 'digits'?"),
    "unknown file": (["run", "no-such.yaml"], "there is no file no-such.yaml"),
    "unknown key": (["run", "digits", "--set", "train.gama=0.4"], "train.gama: there is no such key; did you mean 'gamma'?"),
    "mistyped value": (["run", "digits", "--set", "train.steps=many"], "train.steps: Input should be a valid integer"),
    "no value": (["run", "digits", "--set", "train.gamma"], "expected key.path=value"),
    "epsilon in levels": (["run", "digits", "--set", "threat=linf:8"], "did you mean 'linf:8/255'?"),
    "epsilon beyond one": (["run", "digits", "--set", "threat=linf:300"], "expected an epsilon in (0, 1]"),
    "threat without norm": (["run", "digits", "--set", "threat=8/255"], "expected a threat model such as 'linf:8/255'"),
    "gamma beyond one": (["run", "digits", "--set", "train.gamma=1.4"], "less than or equal to 1"),
    "share without proxy": (["run", "digits", "--set", "proxy=null"], "there is no proxy to sample from"),
    "radius beyond the cap": (["run", "digits", "--set", "certify.radii=[0, 1]"], "no radius above 0.800 can be certified"),
    "unknown run": (["show", "no-such-run"], "there is no run 'no-such-run'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_refused_at_once(case: str, make_program: Callable[[], Program]) -> None:
    """Wrong use ends with code 2 and one message with the remedy; nothing is written and no traceback is shown."""
    program = make_program()
    arguments, message = WRONG[case]
    done = program(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (program.home / "store").exists()


@pytest.mark.slow
def test_class_missing_from_training(make_program: Callable[[], Program]) -> None:
    """A training split too small to have every class is refused by the first stage, with code 1."""
    program = make_program()
    done = program("run", str(program.preset), "--set", "source.num_train=9")
    assert done.returncode == 1
    assert "expected source.num_train of at least 10, one image for each class, got 9" in done.stderr


def test_home_and_output_that_cannot_be_written(make_program: Callable[[], Program]) -> None:
    """A file where a folder is needed is named before any work is spent."""
    program = make_program()
    blocked = program.home / "file"
    blocked.write_text("in the way")
    done = program("run", str(program.preset), PROXYROB_HOME=str(blocked))
    assert done.returncode == 2
    assert "choose another folder" in done.stderr
    done = program("run", str(program.preset), "--output", str(blocked))
    assert done.returncode == 1
    assert f"{blocked} cannot hold results because a file is in the way" in done.stderr
    assert not list(program.home.glob("store/*/*/stage.json"))


def _copy(finished: Finished, make_program: Callable[[], Program]) -> Program:
    """A home with the finished run's stages, to be damaged."""
    program = make_program()
    shutil.copytree(finished.program.home / "store", program.home / "store")
    return program


def _forget(program: Program, kind: str) -> None:
    """Remove the results of one kind of stage, so that it has to read its inputs again."""
    for path in program.home.glob(f"store/{kind}/*"):
        shutil.rmtree(path)


@pytest.mark.slow
def test_damaged_shard_is_named(finished: Finished, make_program: Callable[[], Program]) -> None:
    """A flipped byte in a shard stops the stage that reads it: shard, expected hash, remedy; following the remedy works."""
    program = _copy(finished, make_program)
    (shard,) = program.home.glob("store/samples/*/shard-000002.npy")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 255
    shard.chmod(0o644)
    shard.write_bytes(bytes(content))
    _forget(program, "train")
    done = program("run", str(program.preset))
    assert done.returncode == 1
    assert f"{shard} is damaged: expected sha256 " in done.stderr
    assert f"delete {shard} and run again" in done.stderr
    shard.unlink()
    output = program.home / "output"
    again = program("run", str(program.preset), "--output", str(output))
    assert again.returncode == 0, again.stderr
    assert program.report(output)["models"] == finished.report["models"]


@pytest.mark.slow
def test_damaged_checkpoint_is_named(finished: Finished, make_program: Callable[[], Program]) -> None:
    """A damaged checkpoint is not resumed from: it is named with its expected hash and with what follows when it
    is deleted: the stage goes on from the one before, or, after the last, starts anew."""
    program = _copy(finished, make_program)
    _forget(program, "train")
    assert kill_at(program, program.home / "output", "store/train/*/scratch/checkpoint-00000040.pt")
    checkpoints = list(program.home.glob("store/train/*/scratch/checkpoint-*.pt"))
    assert checkpoints
    for path in checkpoints:
        path.write_bytes(path.read_bytes()[:-7])
    output = program.home / "output"
    damage = re.compile(
        r"\S+\.pt is damaged: expected \d+ bytes with sha256 [0-9a-f]{64}, got \d+ bytes; delete (\S+)\.json and "
    )
    left = list(checkpoints)
    while (again := program("run", str(program.preset), "--output", str(output))).returncode:
        assert again.returncode == 1
        named = damage.search(again.stderr)
        assert named is not None, again.stderr
        (path,) = [path for path in left if path.stem == named[1] and f"in {path.parent} and run again" in again.stderr]
        left.remove(path)
        then = "goes on from step " if any(other.parent == path.parent for other in left) else "starts from its first step"
        assert f"this stage then {then}" in again.stderr
        path.unlink()
        path.with_suffix(".json").unlink()
    assert len(left) < len(checkpoints)
    assert program.report(output)["models"] == finished.report["models"]


@pytest.mark.slow
def test_store_of_another_configuration(finished: Finished, make_program: Callable[[], Program]) -> None:
    """A stage folder whose record belongs to another configuration is refused, not overwritten."""
    program = _copy(finished, make_program)
    (record,) = program.home.glob("store/proxy/*/stage.json")
    foreign = record.read_text().replace(record.parent.name, "f" * 16)
    record.write_text(foreign)
    done = program("run", str(program.preset))
    assert done.returncode == 1
    assert "was written by another configuration of stage 'proxy'" in done.stderr
    assert record.read_text() == foreign


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB; making one takes root on Linux."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("a small file system cannot be mounted here; it takes root on Linux")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_full_disk(make_program: Callable[[], Program], small_disk: Path, finished: Finished) -> None:
    """A full disk ends the run with one message; with space made, the same command goes on to the same figures."""
    program = make_program()
    (program.home / "store").symlink_to(small_disk)
    done = program("run", str(program.preset))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "The disk is full. Free some space and give the same command again" in done.stderr
    assert list(program.home.glob("store/source/*/stage.json")), "what was finished before is kept"
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    output = program.home / "output"
    again = program("run", str(program.preset), "--output", str(output))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "source" in program.report(output)["cached"]
    assert program.report(output)["models"] == finished.report["models"]


@pytest.mark.slow
def test_interrupt_is_quiet(make_program: Callable[[], Program]) -> None:
    """Ctrl-C ends the run with one line and code 130, within seconds, and leaves no process behind."""
    program = make_program()
    process = program.start("run", str(program.preset), new_session=True)
    deadline = time.monotonic() + 120
    while not list(program.home.glob("store/train/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "interrupted; give the same command again" in printed
    assert "Traceback" not in printed
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
