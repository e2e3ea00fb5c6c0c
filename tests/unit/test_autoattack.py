"""AutoAttack in pieces: what is attacked, what is believed, what other ensembles are called, and what does not leak out."""

from functools import partial
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from proxyrob.attacks import attack_fab, attack_square
from proxyrob.errors import CheckpointMismatch, DataIntegrityError
from proxyrob.evaluate import STANDARD_ATTACKS, AttackRun, Ensemble, run_autoattack
from proxyrob.evaluate.ensemble import Mode
from proxyrob.storage import DataPlace, Stage
from proxyrob.threat import parse_threat
from tests.conftest import MakeStage
from tests.toys import (
    Killer,
    Linear,
    Recorder,
    StopHereError,
    answers,
    breakable,
    files_below,
    middle_images,
    random_images,
    random_linear,
)

LINF = parse_threat("linf:0.1")


@pytest.fixture(autouse=True)
def _short_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred queries of Square and twenty steps of FAB are enough here; that the settings are AutoAttack's is shown under
    ``peer``."""
    monkeypatch.setattr("proxyrob.evaluate.ensemble.attack_square", partial(attack_square, queries=100))
    monkeypatch.setattr("proxyrob.evaluate.ensemble.attack_fab", partial(attack_fab, steps=20))


def _run(model: nn.Module, images: Tensor, labels: Tensor, stage: Stage, **values: Any) -> AttackRun:
    units = DataPlace.of(stage.scratch / "autoattack")
    given: dict[str, Any] = {"threat": LINF, "batch_size": 4, "seed": 0, "units": units, **values}
    return run_autoattack(model, images, labels, given.pop("threat"), **given)


def _units(stage: Stage) -> list[str]:
    return sorted(name.removesuffix(".parquet") for name in files_below(stage.scratch / "autoattack") - {"binding.json"})


def test_misclassified_and_broken_images_are_not_attacked(linear_model: Linear, make_stage: MakeStage) -> None:
    """An attack runs on what is classified correctly and still stands, in batches of the given size."""
    images = random_images(10)
    labels = answers(linear_model, images)
    labels[[0, 3]] = (labels[[0, 3]] + 1) % 10
    stage = make_stage("evaluate")
    run = _run(linear_model, images, labels, stage, threat=parse_threat("linf:0.04"))
    assert list(run.broken) == list(STANDARD_ATTACKS)
    assert not any(hits[[0, 3]].any() for hits in run.broken.values())
    assert np.sum(list(run.broken.values()), axis=0).max() == 1, "no image is broken twice"
    standing = [1, 2, 4, 5, 6, 7, 8, 9]
    for attack in STANDARD_ATTACKS:
        names = [name for name in _units(stage) if name.startswith(f"{attack}-0")]
        tables = [run.work.read(name) for name in names]
        assert [row for table in tables for row in table["index"].to_pylist()] == standing
        assert all(len(table) == 4 for table in tables[:-1])
        assert np.flatnonzero(run.attacked[attack]).tolist() == standing
        standing = [row for row in standing if not run.broken[attack][row]]
    assert 0 < len(standing) < 8, "the toy shows nothing unless some images break and some withstand"


def test_every_broken_image_has_its_adversarial_image(make_stage: MakeStage) -> None:
    """Read from the units, it is misclassified and inside the threat model, under the name of the attack that broke it."""
    model, images = random_linear(classes=4), middle_images(10)
    labels = answers(model, images)
    run = _run(model, images, labels, make_stage("evaluate"), threat=parse_threat("linf:0.02"), batch_size=3)
    parts = [part for part in run.adversarial_images(labels.numpy(), np.arange(len(labels))) if len(part)]
    assert {row: part.attack for part in parts for row in part.indices} == {
        row: attack for attack, hits in run.broken.items() for row in np.flatnonzero(hits)
    }
    assert len(parts) > 1
    for part in parts:
        assert (answers(model, part.images) != torch.from_numpy(part.labels)).all()
        assert torch.allclose(part.images, images[torch.from_numpy(part.indices)], rtol=0, atol=0.02 + 1e-6)


def test_nothing_is_attacked_when_nothing_stands(linear_model: Linear, make_stage: MakeStage) -> None:
    """Images that are all misclassified need no attack."""
    images = random_images(3)
    stage = make_stage("evaluate")
    run = _run(linear_model, images, (answers(linear_model, images) + 1) % 10, stage)
    assert not any(hits.any() for hits in run.broken.values())
    assert _units(stage) == []


def _states(model: nn.Module) -> tuple[object, ...]:
    legacy = np.random.get_state()  # noqa: NPY002  # the legacy state is what third parties draw from
    return repr(legacy), torch.get_rng_state().tolist(), [module.training for module in model.modules()]


def test_global_state_and_modes_are_as_they_were(linear_model: Linear, make_stage: MakeStage) -> None:
    """No global random number is drawn, and the model keeps its modes."""
    model = nn.Sequential(linear_model, nn.Dropout(0.5)).train()
    images = random_images(4)
    model[1].eval()
    before = _states(model)
    _run(model, images, answers(linear_model, images), make_stage("evaluate"))
    assert _states(model) == before


@pytest.mark.parametrize(
    ("values", "differing"),
    [
        ({"threat": parse_threat("linf:0.11")}, r"epsilon: .*1/10.* and .*11/100"),
        ({"threat": parse_threat("l2:0.1")}, r"norm: .*linf.* and .*l2"),
        ({"seed": 1}, "seed: 0 and 1"),
        ({"batch_size": 5}, "batch size: 4 and 5"),
        ({"images": random_images(4, seed=1)}, "images: "),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "labels: "),
        ({"model": random_linear(seed=1)}, "model: "),
        ({"mode": "gate"}, "ensemble: .*AutoAttack standard.* and .*gate search"),
    ],
)
def test_units_of_other_work_are_refused_by_name(
    values: dict[str, Any], differing: str, linear_model: Linear, make_stage: MakeStage
) -> None:
    """Model, images, labels, threat model, seed, batch size and ensemble bind the units; the message says what differs."""
    images, stage = random_images(4), make_stage("evaluate")
    given: dict[str, Any] = {"model": linear_model, "images": images, "labels": answers(linear_model, images)}
    _run(**given, stage=stage)
    with pytest.raises(CheckpointMismatch, match=differing):
        _run(**{**given, **values}, stage=stage)


def test_units_of_another_version_of_the_attacks_are_refused(
    linear_model: Linear, make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the attacks' own program was is part of the binding."""
    images, stage = random_images(4), make_stage("evaluate")
    _run(linear_model, images, answers(linear_model, images), stage)
    monkeypatch.setattr("proxyrob.evaluate.binding._hash_attacks", lambda: "another")
    with pytest.raises(CheckpointMismatch, match=r'attacks: .* and "another"'):
        _run(linear_model, images, answers(linear_model, images), stage)


def test_units_that_do_not_cover_what_stood_are_refused(linear_model: Linear, make_stage: MakeStage) -> None:
    """A unit with verdicts on other images than those that stood before its attack is not merged."""
    images, stage = middle_images(8), make_stage("evaluate")
    labels, threat = answers(linear_model, images), parse_threat("linf:0.005")
    run = _run(linear_model, images, labels, stage, threat=threat)
    folder = stage.scratch / "autoattack"
    assert run.broken["apgd-ce"].sum() < 4
    (folder / "square-0001.parquet").write_bytes((folder / "square-0000.parquet").read_bytes())
    with pytest.raises(DataIntegrityError, match=r"square-0001 has verdicts on 4 images, not on the \d that stood"):
        _run(linear_model, images, labels, stage, threat=threat)


class _AnswersOnce(nn.Module):
    """A model that changes its mind: after ``honest`` calls it gives the same answer to everything. Copies of it do not."""

    def __init__(self, model: nn.Module, honest: int, answer: int) -> None:
        super().__init__()
        self.model, self.honest, self.answer, self.calls = model, honest, answer, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return _AnswersOnce(self.model, 10**9, 0)

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        logits = self.model(images)
        return logits if self.calls <= self.honest else logits * 0 + torch.eye(10)[self.answer]


def test_a_verdict_is_the_models_own_answer_to_the_stored_image(make_stage: MakeStage) -> None:
    """Attacks read a copy, and each image that they claim is shown to the model again, from what was stored: only if it errs
    once more is the image broken."""
    model, images = random_linear(), random_images(4)
    labels = answers(model, images)
    honest = _AnswersOnce(model, 10**9, 0)
    assert _run(honest, images, labels, make_stage("evaluate", k="honest")).broken["apgd-ce"].all()
    changing = _AnswersOnce(model, honest.calls - 1, int(labels[0]))
    run = _run(changing, images, labels, make_stage("evaluate", k="changing"))
    assert changing.calls >= honest.calls
    assert run.broken["apgd-ce"].tolist() == (labels != labels[0]).tolist()


# Progress


def test_progress_tells_what_is_left_and_what_is_known(linear_model: Linear, make_stage: MakeStage) -> None:
    """The upper bound only falls and lies in its interval, images are counted down in each attack, and all ends at the end."""
    images, recorder = middle_images(10), Recorder()
    run = _run(
        linear_model,
        images,
        answers(linear_model, images),
        make_stage("evaluate"),
        threat=parse_threat("linf:0.02"),
        on_progress=recorder,
    )
    done = [done for done, _ in recorder.told]
    bounds = [figures["upper_bound"] for figures in recorder.figures]
    assert done == sorted(done)
    assert recorder.told[-1] == (1000, 1000)
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] == 1.0
    assert bounds[-1] == 1 - np.any(list(run.broken.values()), axis=0).mean()
    assert all(figures["low"] <= figures["upper_bound"] <= figures["high"] for figures in recorder.figures)
    assert recorder.figures[0]["images_left"] == 10
    assert recorder.figures[-1]["images_left"] == recorder.figures[-1]["seconds_left"] == 0
    assert any(figures.get("seconds_left", 0.0) > 0 for figures in recorder.figures)


def test_a_killed_run_goes_on_at_its_last_unit(linear_model: Linear, make_stage: MakeStage) -> None:
    """What was done is kept, and the whole is that of a run that was not disturbed."""
    images = middle_images(10)
    labels, values = answers(linear_model, images), {"threat": parse_threat("linf:0.01")}
    whole, pieces = make_stage("evaluate", k="whole"), make_stage("evaluate", k="pieces")
    expected = _run(linear_model, images, labels, whole, **values)
    with pytest.raises(StopHereError):
        _run(linear_model, images, labels, pieces, **values, on_progress=Killer(lambda done: done >= 300))
    kept = {name: (pieces.scratch / "autoattack" / f"{name}.parquet").read_bytes() for name in _units(pieces)}
    assert {name.rpartition("-")[0] for name in kept} >= {"apgd-ce", "apgd-t"}
    assert "square-0000" not in kept
    found = _run(linear_model, images, labels, pieces, **values)
    for attack in STANDARD_ATTACKS:
        assert found.broken[attack].tolist() == expected.broken[attack].tolist()
    for name in _units(whole):
        written = (pieces.scratch / "autoattack" / f"{name}.parquet").read_bytes()
        assert written == (whole.scratch / "autoattack" / f"{name}.parquet").read_bytes() == kept.get(name, written)


# Other ensembles


@pytest.mark.parametrize(
    ("classes", "mode", "targets", "name"),
    [
        (2, "standard", 1, "few-class AutoAttack"),
        (3, "standard", 2, "few-class AutoAttack"),
        (9, "standard", 8, "few-class AutoAttack"),
        (10, "standard", 9, "AutoAttack standard"),
        (100, "standard", 9, "AutoAttack standard"),
        (2, "gate", 1, "gate search"),
        (10, "gate", 9, "gate search"),
        (2, "black-box", 1, "black-box search (Square)"),
        (10, "black-box", 9, "black-box search (Square)"),
    ],
)
def test_an_ensemble_is_called_what_it_is(classes: int, mode: Mode, targets: int, name: str) -> None:
    """Nine targets and float32 are standard; whatever is not is named otherwise wherever it is described."""
    ensemble = Ensemble(classes, mode)
    assert (ensemble.num_targets, ensemble.name) == (targets, name)
    for attack in ensemble.attacks:
        assert name in ensemble.describe(attack)
        assert ("standard" in ensemble.describe(attack)) == (name == "AutoAttack standard")
    assert ensemble.attacks == (("square",) if mode == "black-box" else STANDARD_ATTACKS)
    assert mode == "black-box" or ("margin" in ensemble.describe("apgd-t")) == (classes < 4)
    assert get_args(Mode) == ("standard", "gate", "black-box")


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("threat", [parse_threat("linf:0.02"), parse_threat("l2:0.15")])
def test_few_classes_are_attacked_towards_all_others(classes: int, threat: Any, make_stage: MakeStage) -> None:
    """With two, three or five classes every image of a linear model that can be broken is, and no other."""
    model, images = random_linear(classes=classes), middle_images(12)
    run = _run(model, images, answers(model, images), make_stage("evaluate"), threat=threat, batch_size=12)
    expected = breakable(model, images, threat)
    assert run.ensemble.name == "few-class AutoAttack"
    assert np.any(list(run.broken.values()), axis=0).tolist() == expected.tolist()
    assert 0 < int(expected.sum()) < 12


def test_one_class_is_no_classifier(make_stage: MakeStage) -> None:
    """There is nothing to confuse it with."""
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        _run(random_linear(classes=1), random_images(2), torch.zeros(2, dtype=torch.int64), make_stage("evaluate"))


@pytest.mark.parametrize(
    ("target", "reached", "attacks"),
    [
        (0.95, False, ["apgd-ce"]),  # the first batch decides: more than one of 20 is broken
        (0.05, True, list(STANDARD_ATTACKS)),
        (None, None, list(STANDARD_ATTACKS)),
    ],
)
def test_a_gate_ends_as_soon_as_its_target_is_decided(
    target: float | None, reached: bool | None, attacks: list[str], make_stage: MakeStage
) -> None:
    """Too many images broken: it cannot be reached any more. Enough withstood all attacks: it cannot be missed any more. The
    images that nothing was decided on are not attacked, and count for the upper bound."""
    model, images = random_linear(classes=4), middle_images(20)
    stage = make_stage("evaluate")
    run = _run(model, images, answers(model, images), stage, mode="gate", target=target, threat=parse_threat("linf:0.02"))
    assert run.target_reached is reached
    assert [attack for attack in STANDARD_ATTACKS if run.attacked[attack].any()] == attacks
    broken = np.any(list(run.broken.values()), axis=0)
    expected = breakable(model, images, parse_threat("linf:0.02")).numpy()
    assert not (broken & ~expected).any(), "a break was confirmed in float32"
    if target is None:
        assert broken.tolist() == expected.tolist()
    else:
        assert run.attacked[attacks[-1]].sum() < run.attacked["apgd-ce"].sum() + (len(attacks) == 1) * 20
        assert len(run.units) == len(_units(stage)), "no unit was begun after that"


def test_later_units_of_other_workers_do_not_change_what_was_decided(make_stage: MakeStage) -> None:
    """Units count in their order up to the first that decides, though others lie there already."""
    model, images = random_linear(classes=4), middle_images(20)
    labels, threat = answers(model, images), parse_threat("linf:0.02")
    alone, shared = make_stage("evaluate", k="alone"), make_stage("evaluate", k="shared")
    given: dict[str, Any] = {"mode": "gate", "threat": threat, "target": 0.99}
    expected = _run(model, images, labels, alone, **given)
    hurried = _run(model, images, labels, shared, **given)
    everything = [f"apgd-ce-{k:04d}" for k in range(5)]
    assert len(expected.units) < len(everything)

    def break_all(name: str) -> pa.Table:
        rows = np.arange(4) + 4 * everything.index(name)
        return pa.table({"index": rows, "broken": np.ones(4, dtype=bool)})

    hurried.work.complete(everything, break_all)
    again = _run(model, images, labels, shared, **given)
    assert again.units == expected.units
    assert again.broken["apgd-ce"].tolist() == expected.broken["apgd-ce"].tolist()
