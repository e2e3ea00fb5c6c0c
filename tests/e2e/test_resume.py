"""Killed at any moment and started again, a run ends with the figures of one that was not killed."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil

from tests.e2e.conftest import Finished, Program

MOMENTS = {
    "source": "store/source/*",
    "proxy": "store/proxy/*/scratch/checkpoint.json",
    "samples": "store/samples/*/shard-000001.npy",
    "labels": "store/samples/*/labels/*/shard-000001.parquet",
    "train": "store/train/*/scratch/checkpoint-00000040.pt",
    "attack": "store/evaluate/*/scratch/autoattack/apgd-ce-0000.parquet",
    "attack, later": "store/evaluate/*/scratch/autoattack/square-0000.parquet",
    "certify": "store/certify/*/scratch/certificates/images-00001.parquet",
    "sanity": "store/sanity/*",
    "export": "store/export/*/model.onnx",
    "pictures": "store/pictures/*",
}
"""For each stage, a file that appears while it is under way."""


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _kill_at(program: Program, output: Path, pattern: str) -> bool:
    """Start the run, kill its main process when a file appears, wait until its children are gone. Whether it was killed."""
    before = set(program.home.glob(pattern))
    process = program.start("run", str(program.preset), "--output", str(output))
    children: list[psutil.Process] = []
    try:
        while process.poll() is None:
            if set(program.home.glob(pattern)) - before:
                children = _descendants(process.pid)
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
    finally:
        process.communicate(timeout=120)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, f"these processes outlived their parent: {alive}"
    return process.returncode == -signal.SIGKILL


def test_killed_in_every_stage(finished: Finished, make_program: Callable[[], Program]) -> None:
    """kill -9 in each stage in turn loses nothing: the last run goes on, and report and verdicts equal an undisturbed run's."""
    program = make_program()
    output = program.home / "output"
    killed = [moment for moment, pattern in MOMENTS.items() if _kill_at(program, output, pattern)]
    assert len(killed) >= 9, f"only killed in {killed}"
    done = program("run", str(program.preset), "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    report, expected = program.report(output), finished.report
    for key in ("models", "comparison", "promotion", "total_images"):
        assert report[key] == expected[key]
    for variant in ("real-only", "mixed"):
        ours, theirs = (pd.read_parquet(folder / variant / "verdicts.parquet") for folder in (output, finished.output))
        pd.testing.assert_frame_equal(ours, theirs)
    assert not list(program.home.glob("store/**/*.part")), "a killed writer left a temporary file that nothing removes"
