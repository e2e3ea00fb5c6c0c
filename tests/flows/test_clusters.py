"""Stages on real clusters of two nodes, of which one is killed while it works."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from proxyrob.certify import CertificationReport, read_certificates
from proxyrob.evaluate import EvaluationReport
from proxyrob.label import LabelReport
from proxyrob.proxy import SamplesReport, sample_proxy
from proxyrob.storage import Stage
from tests.at_once import JITTER, SAMPLING
from tests.clusters import ENGINES, ROOT, LocalCluster
from tests.counting import Note, read_notes, units_in
from tests.on_cluster import SHARED
from tests.toys import files_below, stage_in

UNIT_S = 0.6
"""Every unit takes so much longer, so that nodes are killed in the middle of one."""
PATIENCE_S = 270.0


def await_note(log: Path, process: "subprocess.Popen[str]", kind: str) -> Note:
    """Wait until a node that has done a unit before begins one with ``/kind/`` in it; raises when the process ends first."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        notes = read_notes(log)
        done = {note.unit: note.node for note in notes if note.what == "done"}
        for note in notes[::-1]:
            if f"/{kind}/" in note.unit and note.unit not in done and note.node in done.values():
                return note
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"no unit of {kind} was begun: {process.communicate()[0]}")


def require_each_done_once(log: Path, killed: str) -> None:
    """No unit was lost, none finished twice, and none begun twice but the one at which the node was killed."""
    begun, done = units_in(log)
    assert begun.keys() == done.keys()
    assert set(done.values()) == {1}
    theirs = [note for note in read_notes(log) if note.node == killed]
    left_behind = {note.unit for note in theirs if note.what == "begun"} - {note.unit for note in theirs if note.what == "done"}
    assert dict(begun - done) == dict.fromkeys(left_behind, 1)
    assert len(left_behind) <= 1
    assert 0 < sum(note.what == "done" for note in theirs) < done.total()


def states_of_tasks(home: Path) -> dict[str, str]:
    """What the run's own Prefect server knows of each task, by the task's name."""
    with closing(sqlite3.connect(home / "prefect" / "prefect.db")) as database:
        return dict(database.execute("select name, state_name from task_run"))


@pytest.fixture
def home(
    tmp_path: Path,
    shared_folder: Path,
    digits: Stage,
    toy_classifier: Stage,
    other_classifier: Stage,
    samples: Stage,
) -> Path:
    """A folder with copies of the stages that those on the cluster need, seen by all nodes."""
    for stage in (digits, toy_classifier, other_classifier, samples):
        shutil.copytree(stage.folder, tmp_path / "home" / stage.folder.relative_to(shared_folder))
    return tmp_path / "home"


def _start(home: Path, cluster: LocalCluster) -> "subprocess.Popen[str]":
    left_out = ("PREFECT", "PROXYROB", "RAY", "DASK")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return subprocess.Popen(
        [sys.executable, "-c", "import sys, pathlib, tests.on_cluster as it; it.main(pathlib.Path(sys.argv[1]))", str(home)],
        env={**kept, "PROXYROB_HOME": str(home), **cluster.environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        ("dask", "evaluate"),
        *(pytest.param("dask", kind, marks=pytest.mark.slow) for kind in ("sample", "label", "certify")),
        *(pytest.param("ray", kind, marks=pytest.mark.slow) for kind in SHARED),
    ],
)
def test_a_node_dies_and_the_job_ends(
    engine: str,
    kind: str,
    home: Path,
    tmp_path: Path,
    labels: Stage,
    evaluation: Stage,
    certified: Stage,
) -> None:
    """One of two nodes is killed with all its processes in the middle of a unit of each kind of stage: the other one takes that
    over, every unit is done once, and what comes out is what one worker alone finds."""
    log = tmp_path / "units"
    with ENGINES[engine](tmp_path / "cluster", log, UNIT_S) as cluster:
        cluster.start_node(1)
        cluster.start_node(2)
        process = _start(home, cluster)
        killed = await_note(log, process, kind).node
        cluster.kill(killed)
        printed, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, printed
    require_each_done_once(log, killed)
    shared = {name: stage_in(home, name) for name in SHARED}
    alone = stage_in(tmp_path, "sample")
    sample_proxy(JITTER, SAMPLING, source=stage_in(home, "source"), proxy=None, seed=0, stage=alone)
    for name, stage, report in (
        ("sample", alone, SamplesReport),
        ("label", labels, LabelReport),
        ("evaluate", evaluation, EvaluationReport),
    ):
        assert shared[name].finished(report) == stage.finished(report)
        for file in files_below(stage.folder) - {"stage.json"}:
            assert (shared[name].folder / file).read_bytes() == (stage.folder / file).read_bytes()
    assert shared["certify"].finished(CertificationReport) == certified.finished(CertificationReport)
    ours, theirs = (read_certificates(stage)[0].drop(columns="elapsed_s") for stage in (shared["certify"], certified))
    pd.testing.assert_frame_equal(ours, theirs)
    unended = {
        name: state for name, state in states_of_tasks(home).items() if state not in {"Completed", "Crashed", "Cancelled"}
    }
    assert not unended, "Prefect takes none to be running"
    left = [path for name in SHARED for path in shared[name].folder.rglob("*") if path.name in {".parts", "scratch"}]
    assert not left
