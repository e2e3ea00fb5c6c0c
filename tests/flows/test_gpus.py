"""GPUs are taken by one stage at a time, by whatever processes: with made-up ones, which are as good as real ones for that."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from flows.running import gpus as module
from flows.running import workers
from flows.running.gpus import VISIBLE, Gpu, Gpus, find_gpus
from flows.running.workers import Stopped, WorkerDied, run_in_child

GPUS = tuple(Gpu(str(k), f"made-up-{k}") for k in range(3))

WORKER = """
import json, random, sys, time
from pathlib import Path
from flows.running.gpus import Gpu, Gpus

folder, seed, rounds, names = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(",")
gpus, chance = Gpus(folder, [Gpu(name, name) for name in names]), random.Random(seed)
for k in range(rounds):
    count = chance.choice([1, 1, 2, len(names)])
    with gpus.take(count, f"stage-{seed}-{k}") as taken:
        tokens = taken.environment["CUDA_VISIBLE_DEVICES"].split(",")
        assert len(set(tokens)) == count
        print(json.dumps([time.monotonic_ns(), tokens]), flush=True)
        time.sleep(chance.uniform(0.0, 0.05))
        print(json.dumps([time.monotonic_ns(), []]), flush=True)
"""


def _start(folder: Path, seed: int, rounds: int) -> "subprocess.Popen[str]":
    names = ",".join(gpu.token for gpu in GPUS)
    command = [sys.executable, "-c", WORKER, str(folder), str(seed), str(rounds), names]
    with (folder / f"{seed}.txt").open("w") as told:
        return subprocess.Popen(command, stdout=told, stderr=subprocess.PIPE, text=True)


def test_never_two_holders(tmp_path: Path) -> None:
    """Of five processes that take one, two or all of three GPUs, and of which two are killed on the way, no two have one at a
    time; the others come to an end, also with all GPUs, and every GPU is used."""
    processes = [_start(tmp_path, seed, 15 if seed < 3 else 1000) for seed in range(5)]
    while not all((tmp_path / f"{seed}.txt").stat().st_size for seed in range(5)):  # all are in the middle of their work
        time.sleep(0.01)
    killed_at: list[int] = []
    for process, seconds in zip(processes[3:], (0.31, 0.17), strict=True):
        time.sleep(seconds)
        killed_at.append(time.monotonic_ns())
        process.kill()
    held: list[tuple[int, int, tuple[str, ...]]] = []  # from, until, which
    for number, process in enumerate(processes):
        _, errors = process.communicate(timeout=120)
        assert number > 2 or process.returncode == 0, errors
        told = [json.loads(line) for line in (tmp_path / f"{number}.txt").read_text().splitlines()]
        ends = [moment for moment, tokens in told if not tokens] + killed_at[number - 3 : number - 2] * (number > 2)
        begins = [(moment, tuple(tokens)) for moment, tokens in told if tokens]
        held += [(moment, end, tokens) for (moment, tokens), end in zip(begins, ends, strict=False)]
    for token in (gpu.token for gpu in GPUS):
        mine = sorted((begin, end) for begin, end, tokens in held if token in tokens)
        assert len(mine) > 5
        assert all(end <= begin for (_, end), (begin, _) in pairwise(mine)), f"{token} had two holders"
    assert {len(tokens) for _, _, tokens in held} == {1, 2, 3}
    assert len(held) > 45
    assert set(Gpus(tmp_path, GPUS).holders().values()) == {None}


def _sleep(seconds: float, on_progress: Callable[..., None]) -> str:
    on_progress(os.getpid(), 1)
    time.sleep(seconds)
    return os.environ[VISIBLE]


def _is_free(gpus: Gpus, gpu: Gpu) -> bool:
    return gpus.holders()[gpu] is None


def test_a_child_sees_its_gpus_and_keeps_them(tmp_path: Path) -> None:
    """The variable is that of the child, whatever the fork server was started with; the GPU is the child's as long as it lives,
    also when the process that took it for the child is gone."""
    gpus = Gpus(tmp_path, GPUS)
    free: list[bool] = []

    def look(_process: int, _total: int) -> None:
        free.extend(_is_free(gpus, gpu) for gpu in GPUS)

    with gpus.take(2, "training") as taken:
        seen = run_in_child(
            _sleep, threads=1, on_progress=look, environment=taken.environment, holding=taken.files, seconds=0.0
        )
    assert (seen, free) == ("0,1", [False, False, True])
    assert VISIBLE not in os.environ
    with gpus.take(1, "training") as taken:
        children: list[int] = []
        call = {"threads": 1, "environment": taken.environment, "holding": taken.files, "seconds": 600.0}
        waiting = threading.Thread(target=_die_quietly, args=(call, children))
        waiting.start()
        while not children:
            time.sleep(0.01)
    assert not _is_free(gpus, GPUS[0]), "the block is over, and the child goes on"
    os.kill(children[0], signal.SIGKILL)
    waiting.join()
    assert _is_free(gpus, GPUS[0])


def _die_quietly(call: dict, children: list[int]) -> None:
    with pytest.raises(WorkerDied):
        run_in_child(_sleep, on_progress=lambda process, _total: children.append(process), **call)


def test_who_waits_is_told_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process, stage and time of the holder; who is interrupted while waiting stops."""
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    stopping = threading.Event()
    monkeypatch.setattr(module, "stopping", stopping)
    gpus, told = Gpus(tmp_path, GPUS[:1]), []

    def tell(holders: str) -> None:
        told.append(holders)
        stopping.set()

    with gpus.take(1, "train-mixed"):
        holder = gpus.holders()[GPUS[0]]
        assert holder is not None
        assert (holder.process, holder.what) == (os.getpid(), "train-mixed")
        with pytest.raises(Stopped), Gpus(tmp_path, GPUS[:1]).take(1, "attack-mixed", on_wait=tell):
            pass
    assert told
    assert re.fullmatch(rf"waits for GPU 0, which process {os.getpid()} has since ..:..:.. \(train-mixed\)", told[0])
    stopping.clear()
    with gpus.take(1, "attack-mixed"):
        pass


def test_several_gpus_are_not_passed_over(tmp_path: Path) -> None:
    """Who wants both of two GPUs gets them after those that came before, although others that want one come all the time."""
    order: list[str] = []
    pools = [Gpus(tmp_path, GPUS[:2]) for _ in range(9)]  # each as a process of its own has it

    def work(pool: Gpus, count: int, what: str) -> None:
        with pool.take(count, what):
            order.append(what)
            time.sleep(0.3)

    threads = []
    for pool, count, what in zip(pools, (1, 1, 1, 2, 1, 1, 1, 1, 1), "abcDefghi", strict=True):
        threads.append(threading.Thread(target=work, args=(pool, count, what)))
        threads[-1].start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert order[3] == "D"
    assert sorted(order) == sorted("abcDefghi")


def test_the_earlier_stage_of_a_process_goes_first(tmp_path: Path) -> None:
    """Of the stages of one run that wait for a GPU."""
    pool, order = Gpus(tmp_path, GPUS[:1]), []

    def work(priority: int) -> None:
        with pool.take(1, str(priority), priority=priority):
            order.append(priority)

    with pool.take(1, "first"):
        threads = [threading.Thread(target=work, args=(priority,)) for priority in (4, 2, 3)]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert order[1:] == sorted(order[1:])


@pytest.mark.parametrize("count", [0, 4])
def test_more_than_there_are(count: int, tmp_path: Path) -> None:
    """Refused at once."""
    with (
        pytest.raises(ValueError, match=f"train needs {count} GPUs, of which there are 3"),
        Gpus(tmp_path, GPUS).take(count, "train"),
    ):
        pass


def _three(on_progress: Callable[..., None]) -> tuple[str, ...]:
    return tuple(f"{os.environ.get(VISIBLE)}-{k}" for k in range(3))


@pytest.mark.parametrize(
    ("visible", "device", "tokens"),
    [
        (None, "cuda", ["0", "1", "2"]),
        (None, "cuda:1", ["1"]),
        ("4, 7,GPU-ab", "cuda", ["4", "7", "GPU-ab"]),
        ("4,7,GPU-ab", "cuda:2", ["GPU-ab"]),
        ("4,7", "cpu", []),
    ],
)
def test_the_gpus_of_a_run(visible: str | None, device: str, tokens: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the environment shows, by its names, or the one of them that PROXYROB_DEVICE means."""
    monkeypatch.setattr(module, "_ask_cuda", _three)
    if visible is None:
        monkeypatch.delenv(VISIBLE, raising=False)
    else:
        monkeypatch.setenv(VISIBLE, visible)
    found = find_gpus(device)
    assert [gpu.token for gpu in found] == tokens
    assert all(gpu.identity.startswith(f"{visible}-") for gpu in found)


def test_no_child_begins_with_cuda_in_use() -> None:
    """What the fork server imports asks for no GPU: its children could not use one then, nor choose which they see."""
    program = (
        "import importlib, torch\n"
        "def asked(*_): raise AssertionError('CUDA was asked')\n"
        "torch._C._cuda_getDeviceCount = torch._C._cuda_init = asked\n"
        "torch.cuda._device_count_nvml = lambda: 1  # as on a machine with a GPU\n"
        "from flows.running import workers\n"
        "for name in workers.PRELOADED: importlib.import_module(name)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = {**os.environ, **workers.CHILDREN}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
