"""The stage of sanity checks: over a model, a verdict table and the records of where the model came from."""

from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch

from proxyrob.attacks import margins
from proxyrob.config.evaluate import CheckName
from proxyrob.errors import DataIntegrityError
from proxyrob.evaluate import STANDARD_ATTACKS, SanityCheck, SanityReport, VerdictHeader, check_sanity, tabulate_verdicts
from proxyrob.evaluate.sanity import (
    _check_black_box,
    _check_ensemble,
    _check_inputs,
    _check_near_duplicates,
    _check_selection,
    _likeliest_to_fall,
    withstood,
)
from proxyrob.evaluate.verdicts import VERDICTS, summarise
from proxyrob.label import LabelReport
from proxyrob.models import load_classifier
from proxyrob.source import read_split, source_report
from proxyrob.storage import Stage
from proxyrob.storage.files import write_table
from proxyrob.train import TrainReport
from tests.conftest import MakeStage
from tests.toys import Recorder

HARMLESS, HARMFUL = "1/10000", "1/5"
"""Epsilons at which no attack changes an answer of the toy classifiers, and at which PGD changes nearly all."""


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        (0.0, "passed"),
        (1.0, "passed"),
        (100 / 255, "passed"),
        (100.4 / 255, "failed"),
        (-1 / 255, "failed"),
        (256 / 255, "failed"),
    ],
)
def test_inputs_off_the_grid_or_outside_the_box_are_found(digits: Stage, value: float, outcome: str) -> None:
    """One pixel between two levels, below black or above white: these are not the images of the data set."""
    images = read_split(digits, "test").images
    images[3, 0, 4, 4] = value
    assert _check_inputs(images).outcome == outcome


# Verdict tables


def _table(labels: np.ndarray, order: np.ndarray, counts: dict[str, int], pgd: int) -> pd.DataFrame:
    """Rows are broken in ``order``: so many by the first attack, the next ones by the next. PGD breaks the first ``pgd``."""
    hits, start = {}, 0
    for name in STANDARD_ATTACKS:
        stop = start + counts.get(name, 0)
        hits[name] = np.isin(np.arange(len(labels)), order[start:stop])
        start = stop
    return tabulate_verdicts(labels, labels, hits, {"pgd-1": np.isin(np.arange(len(labels)), order[:pgd])})


def _rows(count: int = 60, *, pgd: int = 10, **counts: int) -> pd.DataFrame:
    """Rows in turn; ``apgd_ce=20`` are broken by that attack."""
    given = {name.replace("_", "-"): number for name, number in {"apgd_ce": 20, **counts}.items()}
    return _table(np.zeros(count, np.int64), np.arange(count), given, pgd)


@pytest.mark.parametrize(("pgd", "outcome"), [(10, "passed"), (20, "passed"), (21, "failed")])
def test_pgd_must_not_beat_autoattack(pgd: int, outcome: str) -> None:
    """Four attacks that break fewer images than the simplest one did not work."""
    found = _check_ensemble(_rows(pgd=pgd), STANDARD_ATTACKS, "pgd-1")
    assert (found.outcome, found.finding) == (
        outcome,
        f"40 of 60 images withstand apgd-ce, apgd-t, fab-t, square; {60 - pgd} withstand pgd-1",
    )


def test_images_that_were_not_attacked_have_not_withstood() -> None:
    """Where a search ended before its last attack, nothing is said of what still stood, nor of that attack."""
    table = _rows()
    table.loc[50:, "square"] = pd.NA
    assert np.flatnonzero(withstood(table, (*STANDARD_ATTACKS, "pgd-1"))).tolist() == list(range(20, 50))
    black_box, ensemble = _check_black_box(table), _check_ensemble(table, STANDARD_ATTACKS, "pgd-1")
    assert black_box.outcome == ensemble.outcome == "not run"
    assert black_box.finding == "10 of 60 images stand that were not attacked by square"


@pytest.mark.parametrize(
    ("count", "square", "outcome"),
    [(60, 2, "passed"), (60, 3, "failed"), (1000, 2, "passed"), (1000, 3, "failed"), (2000, 4, "passed"), (2000, 5, "failed")],
)
def test_a_black_box_must_not_add_much(count: int, square: int, outcome: str) -> None:
    """What breaks without gradients where none helped: two images, or 0.2 % of many."""
    found = _check_black_box(_rows(count, square=square))
    assert (found.outcome, found.finding) == (outcome, f"{square} of {count} images fall to Square and to no gradient")


# The stages that a model came from


def _labelled(stage: Stage, *, num_images: int, num_leaked: int) -> Stage:
    """A finished labelling with so many near-duplicates of test images."""
    given: dict[str, Any] = {"num_kept": num_images - num_leaked, "num_disagree": 0, "suspicious_shards": ()}
    given |= {"kept_per_class": (num_images - num_leaked,), "dropped_per_class": (num_leaked,)}
    stage.finish(LabelReport(num_images=num_images, num_leaked=num_leaked, **given), [], 0.0)
    return stage


@pytest.mark.parametrize(
    ("leaked", "outcome"), [((1, 0), "passed"), ((1, 1), "passed"), ((3, 0), "failed"), ((1, 2), "failed")]
)
def test_near_duplicates_of_test_images_are_counted(make_stage: MakeStage, leaked: tuple[int, int], outcome: str) -> None:
    """Of 2,000 synthetic images in two sets two may nearly equal a test image: the rule is one in a thousand of all."""
    found = _check_near_duplicates(
        [_labelled(make_stage("labels", of=k), num_images=1000, num_leaked=count) for k, count in enumerate(leaked)]
    )
    assert found.outcome == outcome
    assert found.finding.startswith(f"{sum(leaked)} of 2,000 synthetic images nearly equal a test image")


def test_no_synthetic_images_are_no_duplicates() -> None:
    """A model of real images alone passes."""
    found = _check_near_duplicates(())
    assert (found.outcome, found.finding) == ("passed", "there are no synthetic images in the training")


@pytest.mark.parametrize(("split", "outcome"), [(None, "passed"), ("validation", "passed"), ("test", "failed")])
def test_weights_that_the_test_split_chose_are_found(
    toy_classifier: Stage, make_stage: MakeStage, split: str | None, outcome: str
) -> None:
    """Which split chose the released weights is a field of the training's record; its words do not matter."""
    trained, stage = toy_classifier.finished(TrainReport), make_stage("train")
    assert trained is not None
    assert trained.selection_split is None
    stage.finish(
        TrainReport.model_validate({**trained.model_dump(), "selection": "the best in the test", "selection_split": split}),
        [],
        0.0,
    )
    found = _check_selection(stage)
    assert (found.outcome, found.finding) == (outcome, "released weights: the best in the test")


def test_an_unfinished_stage_is_refused(make_stage: MakeStage) -> None:
    """Evidence that is not there is no evidence."""
    with pytest.raises(DataIntegrityError, match="is not a finished stage 'labels'; run the pipeline first"):
        _check_near_duplicates([make_stage("labels")])


# The whole stage


def _evaluation(stage: Stage, model: Stage, source: Stage, epsilon: str, **counts: int) -> Stage:
    """A finished evaluation whose verdicts are given: the images nearest to another class are broken first."""
    split = read_split(source, "test")
    with torch.no_grad():
        order = margins(load_classifier(model)(split.images), split.targets).argsort(descending=True).numpy()
    table = _table(split.labels, order, {"apgd-ce": 20, **{name.replace("_", "-"): k for name, k in counts.items()}}, 10)
    header = VerdictHeader(
        norm="linf",
        epsilon=epsilon,
        attacks=dict.fromkeys((*STANDARD_ATTACKS, "pgd-1"), "given"),
        seed=0,
        split="test",
        model=model.digest,
        data_sha256=source_report(source).content_sha256,
    )
    write_table(stage.folder / VERDICTS, table, header.model_dump(mode="json"))
    stage.finish(summarise(table, "pgd-1", "AutoAttack standard"), [VERDICTS], 0.0)
    return stage


def test_the_images_nearest_to_another_class_are_attacked_again(
    digits: Stage, toy_classifier: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that withstood every attack: where more of the same helps, it helps there first."""
    split, model = read_split(digits, "test"), load_classifier(toy_classifier)
    with torch.no_grad():
        found = margins(model(split.images), split.targets)
    order = found.argsort(descending=True)
    table = _table(split.labels, order.numpy(), {"apgd-ce": 20}, 30)
    monkeypatch.setattr("proxyrob.evaluate.sanity.NUM_ATTACKED", 7)
    rows = np.flatnonzero(withstood(table, (*STANDARD_ATTACKS, "pgd-1")))
    images, labels = _likeliest_to_fall(model, split, rows, "cpu")
    expected = order[30:37]
    assert torch.equal(images, split.images[expected])
    assert torch.equal(labels, split.targets[expected])


@pytest.fixture
def check(digits: Stage, toy_classifier: Stage, other_classifier: Stage, labels: Stage, make_stage: MakeStage) -> Any:
    """``check(square=3)``: the report on the toy classifier with a verdict table of that kind, by the names of the checks."""

    def run(
        model: Stage = toy_classifier, twin: Stage | None = other_classifier, epsilon: str = HARMLESS, **counts: int
    ) -> dict[str, SanityCheck]:
        evaluation = _evaluation(make_stage("evaluate"), model, digits, epsilon, **counts)
        given: dict[str, Any] = {"source": digits, "model": model, "evaluation": evaluation, "twin": twin, "labels": [labels]}
        return {check.name: check for check in check_sanity(**given, seed=0, stage=make_stage("sanity")).checks}

    return run


def _outcomes(found: dict[str, SanityCheck], outcome: str) -> set[str]:
    return {name for name, check in found.items() if check.outcome == outcome}


def test_an_honest_model_passes_every_check(check: Any) -> None:
    """Every check is made, in the order of their names, and none suspects a plain classifier; each says what is allowed."""
    found = check()
    assert tuple(found) == get_args(CheckName)
    assert _outcomes(found, "passed") == set(found), found
    assert all(entry.finding and entry.threshold for entry in found.values())
    assert found["inputs"].finding.startswith("range [0.000, 1.000]")
    assert found["transfer"].finding.startswith("0 of 40 images that withstood every attack fall to images made on another")
    assert found["near-duplicates"].finding.startswith("0 of 120 synthetic images")
    assert found["selection"].finding == "released weights: last step"


def test_a_network_with_batch_normalisation_passes(check: Any, other_classifier: Stage, toy_classifier: Stage) -> None:
    """A stage's model is read in eval mode: its running statistics stay."""
    found = check(model=other_classifier, twin=toy_classifier)
    assert _outcomes(found, "passed") == set(found), found


def test_attacks_that_were_too_weak_are_found(check: Any) -> None:
    """A table in which two thirds withstand an epsilon that nothing withstands: a longer attack shows it."""
    found = check(epsilon=HARMFUL)
    assert "more-steps" in _outcomes(found, "failed")
    assert found["more-steps"].finding.endswith(
        "of 40 images that withstood every attack fall to PGD with 10 steps and 5 starts"
    )


def test_where_nothing_withstood_nothing_is_attacked_again(check: Any) -> None:
    """With every image broken both attacks on what stands are not run, and the others are."""
    found = check(apgd_ce=60)
    assert _outcomes(found, "not run") == {"more-steps", "transfer"}
    assert _outcomes(found, "failed") == set()


def test_without_a_twin_transfer_is_not_run(check: Any) -> None:
    """What could not be checked does not count as passed."""
    assert _outcomes(check(twin=None), "not run") == {"transfer"}


def test_checks_are_kept_and_progress_is_told(
    digits: Stage, toy_classifier: Stage, labels: Stage, make_stage: MakeStage
) -> None:
    """A second call reads the stored report; the first tells its progress from one part to the next, to the end."""
    evaluation = _evaluation(make_stage("evaluate"), toy_classifier, digits, HARMLESS)
    stage, recorder = make_stage("sanity"), Recorder()
    given: dict[str, Any] = {"source": digits, "model": toy_classifier, "evaluation": evaluation, "twin": None, "seed": 0}
    report = check_sanity(**given, labels=[labels], stage=stage, on_progress=recorder)
    assert check_sanity(**given, labels=[labels], stage=stage) == report == stage.finished(SanityReport)
    assert recorder.told == [(done, 10) for done in range(1, 11)]
    assert report.passed
    assert [check.name for check in report.having("not run")] == ["transfer"]
