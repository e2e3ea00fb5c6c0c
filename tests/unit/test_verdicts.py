"""The verdict table, and the accuracies that are derived from it."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from proxyrob.attacks import Attacked
from proxyrob.errors import DataIntegrityError
from proxyrob.evaluate import (
    ADVERSARIAL,
    STANDARD_ATTACKS,
    EvaluationReport,
    evaluate_classifier,
    read_adversarial,
    read_verdicts,
    robust_rows,
    tabulate_verdicts,
)
from proxyrob.evaluate.verdicts import summarise
from proxyrob.models import load_classifier
from proxyrob.source import read_split, source_report
from proxyrob.storage import Stage
from proxyrob.threat import parse_threat
from tests.conftest import MakeStage
from tests.toys import SMALL_EVALUATE, SMALL_THREAT, Killer, Recorder, StopHereError, damage, files_below


def _bools(*values: int) -> np.ndarray:
    return np.array(values, dtype=bool)


@pytest.fixture
def table() -> pd.DataFrame:
    """Six images: misclassified, broken by a, by b, by neither but by pgd, withstanding all, broken by a and by pgd."""
    return tabulate_verdicts(
        np.array([0, 1, 2, 3, 4, 5]),
        np.array([9, 1, 2, 3, 4, 5]),
        {"a": _bools(1, 1, 0, 0, 0, 1), "b": _bools(0, 1, 1, 0, 0, 0)},
        {"pgd-5": _bools(1, 0, 1, 1, 0, 1)},
    )


def test_the_first_attack_that_succeeded_is_named(table: pd.DataFrame) -> None:
    """In the order clean, sequential attacks, independent ones; null where all failed."""
    assert table.broken_by.isna().tolist() == [False, False, False, False, True, False]
    assert table.broken_by.dropna().tolist() == ["clean", "a", "b", "pgd-5", "a"]
    assert table["index"].tolist() == [0, 1, 2, 3, 4, 5]
    assert table.clean_prediction.tolist() == [9, 1, 2, 3, 4, 5]


def test_an_attack_says_nothing_of_images_it_was_not_run_on(table: pd.DataFrame) -> None:
    """Sequential attacks are null for what was broken before, independent ones only for misclassified images."""
    assert table.a.tolist() == [pd.NA, True, False, False, False, True]
    assert table.b.tolist() == [pd.NA, pd.NA, True, False, False, pd.NA]
    assert table["pgd-5"].tolist() == [pd.NA, False, True, True, False, True]
    assert {str(table[name].dtype) for name in ("a", "b", "pgd-5")} == {"boolean"}


@pytest.mark.parametrize(
    ("attacks", "robust"),
    [
        ((), [False, True, True, True, True, True]),
        (("a",), [False, False, True, True, True, False]),
        (("a", "b"), [False, False, False, True, True, False]),
        (("b",), [False, True, False, True, True, True]),
        (("pgd-5",), [False, True, False, False, True, False]),
    ],
)
def test_robust_images_are_right_and_withstood_every_attack(
    table: pd.DataFrame, attacks: tuple[str, ...], robust: list[bool]
) -> None:
    """A null is no success, and a misclassified image is never robust."""
    assert robust_rows(table, attacks).tolist() == robust


def test_accuracies_are_counted_from_the_table() -> None:
    """Clean, PGD and AutoAttack accuracy with their n, and how many images each attack broke first."""
    hits = {name: _bools(0, k == 0, k == 1, 0, k == 3) for k, name in enumerate(STANDARD_ATTACKS)}
    labels = np.array([0, 1, 2, 3, 4])
    table = tabulate_verdicts(labels, np.array([1, 1, 2, 3, 4]), hits, {"pgd-5": _bools(0, 1, 0, 0, 0)})
    report = summarise(table, "pgd-5")
    assert (report.clean.value, report.pgd.value, report.autoattack.value) == (0.8, 0.6, 0.2)
    assert report.broken_by == {"clean": 1, "apgd-ce": 1, "apgd-t": 1, "square": 1}
    assert (report.clean.n, report.clean.low < 0.8 < report.clean.high) == (5, True)


def _evaluate(digits: Stage, model: Stage, stage: Stage, **values: Any) -> EvaluationReport:
    given: dict[str, Any] = {"threat": SMALL_THREAT, "seed": 0, "source": digits, "model": model, "stage": stage, **values}
    return evaluate_classifier(SMALL_EVALUATE, **given)


def test_an_evaluation_covers_the_whole_test_split(evaluation: Stage, digits: Stage, toy_classifier: Stage) -> None:
    """One row for every test image, with its label and the classifier's own prediction; the report is that of the table."""
    table, header = read_verdicts(evaluation)
    split = read_split(digits, "test")
    assert table["index"].tolist() == list(range(60))
    assert table.label.tolist() == split.labels.tolist()
    assert table.clean_prediction.tolist() == load_classifier(toy_classifier)(split.images).argmax(1).tolist()
    assert evaluation.finished(EvaluationReport) == summarise(table, "pgd-5")
    assert set(header.attacks) == {*STANDARD_ATTACKS, "pgd-5"}


def test_a_header_says_under_which_conditions_verdicts_were_found(
    evaluation: Stage, digits: Stage, toy_classifier: Stage
) -> None:
    """Norm, exact epsilon, versions of the attacks, seed, split, and digests of model and data."""
    _, header = read_verdicts(evaluation)
    assert (header.norm, header.epsilon, header.seed, header.split) == ("linf", "1/5", 0, "test")
    assert (header.model, header.data_sha256) == (toy_classifier.digest, source_report(digits).content_sha256)
    for attack in STANDARD_ATTACKS:
        assert header.attacks[attack] == "proxyrob AutoAttack standard, settings of pyautoattack 0.2.0, verdicts equal in tests"
    assert "5 steps of 0.125 epsilon" in header.attacks["pgd-5"]


def test_attacks_find_what_clean_images_do_not_show(evaluation: Stage) -> None:
    """A naturally trained classifier is right on most images and robust on hardly any; AutoAttack is not weaker than PGD."""
    report = evaluation.finished(EvaluationReport)
    assert report is not None
    assert report.clean.value > 0.7
    assert report.autoattack.value <= report.pgd.value <= report.clean.value - 0.3


def test_a_killed_evaluation_goes_on_and_finds_the_same(digits: Stage, toy_classifier: Stage, make_stage: MakeStage) -> None:
    """Killed between two batches and resumed, the table is the same and what was finished is not computed again.

    (That a kill between two attacks changes nothing is shown against pyautoattack itself, under ``peer``.)
    """
    threat = parse_threat("linf:0.25")
    whole, pieces = make_stage("evaluate", k="whole"), make_stage("evaluate", k="pieces")
    expected = _evaluate(digits, toy_classifier, whole, threat=threat)
    with pytest.raises(StopHereError):
        _evaluate(digits, toy_classifier, pieces, threat=threat, on_progress=Killer(lambda done: done >= 50))
    finished = files_below(pieces.scratch)
    assert {name.split("/")[0] for name in finished} == {"pgd", "autoattack"}
    times = {name: (pieces.scratch / name).stat().st_mtime_ns for name in finished}
    seen: dict[str, int] = {}

    def look(done: int, total: int, **figures: float) -> None:
        seen.update({name: (pieces.scratch / name).stat().st_mtime_ns for name in finished})

    assert _evaluate(digits, toy_classifier, pieces, threat=threat, on_progress=look) == expected
    assert seen == times, "a finished unit was written again"
    pd.testing.assert_frame_equal(read_verdicts(pieces)[0], read_verdicts(whole)[0])
    for name in ("verdicts.parquet", "adversarial.parquet"):
        assert (pieces.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert files_below(pieces.folder) == {"verdicts.parquet", "adversarial.parquet", "stage.json"}


def test_every_image_that_an_attack_broke_has_its_adversarial_image(evaluation: Stage, toy_classifier: Stage) -> None:
    """One each, by the attack that the table names, misclassified by the classifier when it is loaded anew."""
    table, _ = read_verdicts(evaluation)
    classifier = load_classifier(toy_classifier)
    stored = {}
    for part in read_adversarial(evaluation.verified(ADVERSARIAL)):
        assert np.array_equal(part.labels, table.label.to_numpy()[part.indices])
        assert (classifier(part.images).argmax(1).numpy() != part.labels).all()
        stored |= dict.fromkeys(part.indices.tolist(), part.attack)
    expected = table.broken_by[table.broken_by.notna() & (table.broken_by != "clean")]
    assert stored == expected.to_dict()
    assert len(stored) > 20


def test_an_image_that_pgd_alone_broke_is_kept_too(
    digits: Stage, toy_classifier: Stage, make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the ensemble finds nothing, as here where it is made to, PGD's images are those that are kept."""
    monkeypatch.setattr(
        "proxyrob.evaluate.autoattack.Ensemble.attack",
        lambda _self, _attack, _model, images, *_given, **_values: Attacked(images, torch.zeros(len(images), dtype=torch.bool)),
    )
    stage = make_stage("evaluate")
    report = _evaluate(digits, toy_classifier, stage)
    found = [part for part in read_adversarial(stage.verified(ADVERSARIAL)) if len(part)]
    assert {part.attack for part in found} == {"pgd-5"}
    assert sum(len(part) for part in found) == report.broken_by["pgd-5"] > 20


def test_a_gate_search_is_not_called_autoattack_standard(digits: Stage, toy_classifier: Stage, make_stage: MakeStage) -> None:
    """Its header and its report say what it was; images that it did not get to are null, and count as not broken."""
    stage = make_stage("evaluate")
    config = SMALL_EVALUATE.replace(mode="gate", target=0.99)
    report = evaluate_classifier(config, source=digits, model=toy_classifier, threat=SMALL_THREAT, seed=0, stage=stage)
    table, header = read_verdicts(stage)
    assert (report.ensemble, report.target_reached) == ("gate search", False)
    assert not any("standard" in text for text in header.attacks.values())
    assert table["square"].isna().to_numpy().all()
    assert 0 < report.autoattack.value < 0.99


def test_workers_that_share_an_evaluation_find_what_one_finds(
    digits: Stage, toy_classifier: Stage, make_stage: MakeStage
) -> None:
    """Three at once: every one of them gets the report of one alone, and the files are the same bytes."""
    threat = parse_threat("linf:0.25")
    alone, shared = make_stage("evaluate", k="alone"), make_stage("evaluate", k="shared")
    expected = _evaluate(digits, toy_classifier, alone, threat=threat)
    with ThreadPoolExecutor(3) as workers:
        reports = list(workers.map(lambda _: _evaluate(digits, toy_classifier, shared, threat=threat), range(3)))
    assert reports == [expected] * 3
    for name in ("verdicts.parquet", "adversarial.parquet"):
        assert (shared.folder / name).read_bytes() == (alone.folder / name).read_bytes()


def test_a_finished_evaluation_is_not_run_again(evaluation: Stage, digits: Stage, toy_classifier: Stage) -> None:
    """A second call gives the report and attacks nothing."""
    recorder = Recorder()
    report = _evaluate(digits, toy_classifier, evaluation, on_progress=recorder)
    assert (report, recorder.told) == (evaluation.finished(EvaluationReport), [])


def test_progress_ends_with_everything(digits: Stage, toy_classifier: Stage, make_stage: MakeStage) -> None:
    """Progress grows to its total also when the first attack broke every image and the others have nothing to do."""
    recorder = Recorder()
    report = _evaluate(digits, toy_classifier, make_stage("evaluate"), threat=parse_threat("linf:0.3"), on_progress=recorder)
    assert report.autoattack.value == 0.0
    done = [done for done, _ in recorder.told]
    assert done == sorted(done)
    assert recorder.told[-1][0] == recorder.told[-1][1]


def test_a_damaged_table_is_refused(evaluation: Stage, tmp_path: Path) -> None:
    """Verdicts are hashed before anything is concluded from them."""
    shutil.copytree(evaluation.folder, tmp_path / "copy")
    copy = Stage(evaluation.name, evaluation.digest, tmp_path / "copy", {})
    assert len(read_verdicts(copy)[0]) == 60
    damage(copy.folder / "verdicts.parquet")
    with pytest.raises(DataIntegrityError, match=r"verdicts\.parquet is damaged"):
        read_verdicts(copy)
