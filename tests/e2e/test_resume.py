"""Killed at any moment and started again, a run ends with the figures of one that was not killed."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from flows.plan import plan_pipeline
from proxyrob.config import load_config
from tests.e2e.conftest import Finished, Program

MOMENTS = {
    "source": ("store/source/*", "store/source/*/train-images.npy"),
    "proxy": ("store/proxy/*", "store/proxy/*/scratch/checkpoint-*.json"),
    "samples": ("store/samples/*", "store/samples/*/shard-000001.npy"),
    "labels": ("store/samples/*/labels", "store/samples/*/labels/*/shard-000001.parquet"),
    "train": ("store/train/*", "store/train/*/scratch/checkpoint-00000040.pt"),
    "attack": ("store/evaluate/*", "store/evaluate/*/scratch/autoattack/apgd-ce-0000.parquet"),
    "attack, later": ("store/no-such-stage", "store/evaluate/*/scratch/autoattack/square-0000.parquet"),
    "certify": ("store/certify/*", "store/certify/*/scratch/certificates/images-00001.parquet"),
    "sanity": ("store/sanity/*", "store/sanity/*/.lock"),
    "export": ("store/export/*", "store/export/*/model.onnx"),
    "pictures": ("store/pictures/*", "store/pictures/*/.lock"),
}
"""For each stage: what to remove so that it is done again, and a file that appears while it is under way."""

TIMED = {"certificates.parquet", "history.parquet"}
"""Tables with a column of times."""


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_at(program: Program, output: Path, pattern: str) -> bool:
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


def _records(program: Program) -> dict[str, dict[str, Any]]:
    """The record of every stage of the tiny preset, without what tells the time."""
    records = {}
    for stage in plan_pipeline(load_config(str(program.preset)), program.home / "store").stages():
        record = json.loads(stage.record_path.read_text())
        del record["elapsed_s"], record["finished_at"]
        record["files"] = [entry for entry in record["files"] if entry["name"] not in TIMED]
        records[f"{stage.name} {stage.digest}"] = record
    return records


@pytest.mark.slow
def test_killed_in_every_stage(finished: Finished, make_program: Callable[[], Program]) -> None:
    """kill -9 in each stage in turn loses nothing: the last run goes on, and every stage ends with the report and the very
    bytes of a run that was not disturbed."""
    program = make_program()
    shutil.copytree(finished.program.home / "store", program.home / "store")
    output = program.home / "output"
    for moment, (kind, pattern) in MOMENTS.items():
        for folder in program.home.glob(kind):
            shutil.rmtree(folder)
        assert kill_at(program, output, pattern), f"the run ended before it could be killed ({moment})"
    done = program("run", str(program.preset), "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = _records(program), _records(finished.program)
    assert set(ours) == set(theirs)
    for name, record in ours.items():
        assert record == theirs[name], name
    report = program.report(output)
    for key in ("models", "comparison", "promotion", "total_images"):
        assert report[key] == finished.report[key]
    for variant in ("real-only", "mixed"):
        table = pd.read_parquet(output / variant / "verdicts.parquet")
        pd.testing.assert_frame_equal(table, pd.read_parquet(finished.output / variant / "verdicts.parquet"))
    left = [path for path in program.home.glob("store/**/*.part") if "samples" not in path.parts]
    assert not left, "nothing half-written is left, but where writers on other machines could be at work: there for a day"
