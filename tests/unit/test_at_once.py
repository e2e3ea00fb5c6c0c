"""Any number of workers on the same images, and any of them killed: nothing is done twice, and what comes out is what one
worker alone finds."""

import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from proxyrob.certify import CertificationReport, read_certificates
from proxyrob.evaluate import EvaluationReport
from proxyrob.label import label_shards
from proxyrob.proxy import SamplesReport, sample_proxy
from proxyrob.shards import INDEX, MANIFEST, read_manifest
from proxyrob.storage import DataPlace, Stage
from tests.at_once import JITTER, SAMPLING, THRESHOLD, Job, run_at_once
from tests.counting import units_in
from tests.toys import files_below, stage_in

SHARDS = {f"shard-{number:06d}" for number in range(12)}


@dataclass(frozen=True)
class Folders:
    """What one worker made alone, and what several made at once in three folders."""

    images: Path
    labels: Path
    ten: Path
    some_killed: Path
    labelled: Path
    attacked: Path
    certified: Path


@pytest.fixture(scope="module")
def folders(
    shared_folder: Path,
    digits: Stage,
    toy_classifier: Stage,
    other_classifier: Stage,
    tmp_path_factory: pytest.TempPathFactory,
) -> Folders:
    """All work is done once, because starting a process takes longer than the work."""
    home = tmp_path_factory.mktemp("at-once")
    made = Folders(*(home / field.name for field in fields(Folders)))
    images = DataPlace.of(made.images)
    about: dict[str, Any] = {"source": digits, "images": images}
    sample_proxy(JITTER, SAMPLING, proxy=None, seed=0, stage=stage_in(home / "home", "samples"), **about)
    voters: dict[str, Any] = {"first": toy_classifier, "second": other_classifier}
    label_shards(THRESHOLD, **about, **voters, stage=stage_in(home / "home", "labels"), labels=DataPlace.of(made.labels))
    for folder in (made.ten, made.some_killed, made.labelled, made.attacked, made.certified):
        for stage in (digits, toy_classifier, other_classifier):
            shutil.copytree(stage.folder, folder / stage.folder.relative_to(shared_folder))
    shutil.copytree(made.images, made.labelled / "images")
    run_at_once(
        Job("sample", str(made.ten), count=10),
        Job("sample", str(made.some_killed), count=5, dead=3),
        Job("label", str(made.labelled), count=3, dead=1),
        Job("attack", str(made.attacked), count=4, dead=1),
        Job("certify", str(made.certified), count=4, dead=1),
    )
    return made


def _bytes(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_below(folder)}


def test_ten_workers_at_once_sample_what_one_does(folders: Folders) -> None:
    """Ten processes that begin at the same moment leave the very files of one, manifest included, and all report them."""
    assert _bytes(folders.ten / "images") == _bytes(folders.images)
    assert set(_bytes(folders.images)) == {MANIFEST, *(f"{name}.npy" for name in SHARDS)}
    reports = [stage_in(folders.ten / f"home-{number}", "samples").finished(SamplesReport) for number in range(10)]
    assert {report.sha256 for report in reports if report} == {read_manifest(DataPlace.of(folders.images)).sha256}
    assert None not in reports


def test_killed_workers_leave_the_rest_to_others(folders: Folders) -> None:
    """Of workers that are killed in the middle of a shard no half remains: those that are left end with the same files."""
    assert _bytes(folders.some_killed / "images") == _bytes(folders.images)


@pytest.mark.parametrize(
    ("name", "num_units", "num_killed"),
    [("ten", 12, 0), ("some_killed", 12, 3), ("labelled", 12, 1), ("attacked", None, 1), ("certified", 13, 1)],
)
def test_every_unit_is_done_once(folders: Folders, name: str, num_units: int | None, num_killed: int) -> None:
    """However many workers there are, each unit is finished once, and begun again only where its worker was killed."""
    begun, done = units_in(getattr(folders, name) / "units")
    assert set(done.values()) == {1}
    assert num_units in {None, len(done)}
    assert begun.keys() == done.keys()
    assert (begun - done).total() == num_killed


def test_workers_at_once_attack_as_one_does(folders: Folders, evaluation: Stage) -> None:
    """Three that share a stage, beside one that is killed: the files of one alone, byte by byte, and nothing else."""
    shared = stage_in(folders.attacked, "evaluate")
    assert shared.finished(EvaluationReport) == evaluation.finished(EvaluationReport)
    for name in ("verdicts.parquet", "adversarial.parquet"):
        assert (shared.folder / name).read_bytes() == (evaluation.folder / name).read_bytes()
    assert files_below(shared.folder) == {"verdicts.parquet", "adversarial.parquet", "stage.json"}


def test_workers_at_once_certify_as_one_does(folders: Folders, certified: Stage) -> None:
    """Three that share a stage, beside one that is killed: the certificates of one alone, but for the time they took."""
    shared = stage_in(folders.certified, "certify")
    assert shared.finished(CertificationReport) == certified.finished(CertificationReport)
    (ours, header), (theirs, expected) = (read_certificates(stage) for stage in (shared, certified))
    pd.testing.assert_frame_equal(ours.drop(columns="elapsed_s"), theirs.drop(columns="elapsed_s"))
    assert header == expected
    assert files_below(shared.folder) == {"certificates.parquet", "stage.json"}


def test_workers_at_once_label_what_one_does(folders: Folders) -> None:
    """Two processes that label one set, beside one that is killed, leave the very tables and index of one alone."""
    assert set(_bytes(folders.labels)) == {INDEX, *(f"{name}.parquet" for name in SHARDS)}
    assert _bytes(folders.labelled / "labels") == _bytes(folders.labels)
