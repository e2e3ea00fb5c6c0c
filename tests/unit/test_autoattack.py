"""AutoAttack in pieces: what is refused, what is checked, and what does not leak out."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from proxyrob.errors import DataIntegrityError
from proxyrob.evaluate import STANDARD_ATTACKS, run_autoattack
from proxyrob.evaluate.autoattack import _check_inside, autoattack_version
from proxyrob.storage import Stage
from proxyrob.threat import Threat, parse_threat
from tests.conftest import MakeStage
from tests.toys import Linear, files_below, random_images, random_linear

LINF, L2 = parse_threat("linf:0.1"), parse_threat("l2:0.3")


def _own_labels(model: nn.Module, images: Tensor) -> Tensor:
    """The labels that make every image correctly classified."""
    with torch.no_grad():
        return model(images).argmax(1)


def _run(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, stage: Stage) -> dict[str, np.ndarray]:
    return run_autoattack(model, images, labels, threat, batch_size=4, seed=0, stage=stage)


@pytest.mark.parametrize("classes", [2, 9])
def test_fewer_than_ten_classes_are_refused(make_stage: MakeStage, classes: int) -> None:
    """Standard AutoAttack aims at nine other classes; with fewer it would silently be a weaker ensemble."""
    model, images = random_linear(classes=classes), random_images(4)
    with pytest.raises(ValueError, match=rf"needs at least 10 classes \(nine targets\), got {classes}"):
        _run(model, images, torch.zeros(4, dtype=torch.int64), LINF, make_stage("evaluate"))


def test_misclassified_and_broken_images_are_not_attacked(linear_model: Linear, make_stage: MakeStage) -> None:
    """An attack runs on what is classified correctly and still stands, in batches of the given size."""
    images = random_images(10)
    labels = _own_labels(linear_model, images)
    labels[[0, 3]] = (labels[[0, 3]] + 1) % 10
    stage = make_stage("evaluate")
    broken = _run(linear_model, images, labels, parse_threat("linf:0.04"), stage)
    assert list(broken) == list(STANDARD_ATTACKS)
    assert not any(hits[[0, 3]].any() for hits in broken.values())
    assert np.sum(list(broken.values()), axis=0).max() == 1, "no image is broken twice"
    units = {name: pd.read_parquet(stage.scratch / "autoattack" / name) for name in files_below(stage.scratch / "autoattack")}
    standing = [1, 2, 4, 5, 6, 7, 8, 9]
    for attack in STANDARD_ATTACKS:
        tables = [units[name] for name in sorted(units) if name.startswith(f"{attack}-0")]
        assert [row for table in tables for row in table["index"]] == standing
        assert all(len(table) == 4 for table in tables[:-1])
        standing = [row for row in standing if not broken[attack][row]]
    assert 0 < len(standing) < 8, "the toy shows nothing unless some images break and some withstand"


def test_nothing_is_attacked_when_nothing_stands(linear_model: Linear, make_stage: MakeStage) -> None:
    """Images that are all misclassified need no attack."""
    images = random_images(3)
    stage = make_stage("evaluate")
    broken = _run(linear_model, images, (_own_labels(linear_model, images) + 1) % 10, LINF, stage)
    assert not any(hits.any() for hits in broken.values())
    assert files_below(stage.folder) == set()


def _states(model: nn.Module) -> tuple[object, ...]:
    legacy = np.random.get_state()  # noqa: NPY002  # the legacy state is what third parties draw from
    return repr(legacy), torch.get_rng_state().tolist(), [module.training for module in model.modules()]


def test_global_state_and_modes_are_as_they_were(linear_model: Linear, make_stage: MakeStage) -> None:
    """AutoAttack seeds and draws globally; outside nobody notices, and the model keeps its mode."""
    model = nn.Sequential(linear_model, nn.Dropout(0.5)).train()
    images = random_images(4)
    model[1].eval()
    before = _states(model)
    _run(model, images, _own_labels(linear_model, images), LINF, make_stage("evaluate"))
    assert _states(model) == before


def test_the_version_is_that_of_the_installed_package() -> None:
    """A header says what ran."""
    assert autoattack_version() == "pyautoattack 0.2.0 standard"


@pytest.mark.parametrize(("threat", "outside"), [(LINF, 0.1001), (L2, 0.3001)])
def test_an_attack_that_leaves_the_threat_model_is_refused(threat: Threat, outside: float) -> None:
    """Every adversarial image is measured again: one perturbation too large is an error that names attack and norm."""
    images = torch.full((3, 1, 2, 2), 0.5)
    attacked = images.clone()
    attacked[1, 0, 0, 0] += float(threat.epsilon)
    _check_inside(attacked, images, threat, "square")
    attacked[1, 0, 0, 0] = 0.4
    attacked[2, 0, 1, 1] -= outside
    with pytest.raises(DataIntegrityError, match=f"square left the threat model {threat}: a perturbation has norm {outside}"):
        _check_inside(attacked, images, threat, "square")


@pytest.mark.parametrize("value", [-0.001, 1.001, float("nan"), float("inf")])
def test_an_attack_that_leaves_the_box_is_refused(value: float) -> None:
    """A pixel outside [0,1] or NaN is an error, even where the ball would allow it."""
    images = torch.zeros(2, 1, 2, 2) if value < 0.5 else torch.ones(2, 1, 2, 2)
    attacked = images.clone()
    attacked[1, 0, 0, 1] = value
    with pytest.raises(DataIntegrityError, match=r"fab-t left \[0,1\] or produced NaN"):
        _check_inside(attacked, images, LINF, "fab-t")


def test_every_attacked_batch_is_measured(linear_model: Linear, make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no tolerance at all the first batch is refused: what an attack returns is not believed but measured."""
    monkeypatch.setattr("proxyrob.evaluate.autoattack.TOLERANCE", -1.0)
    images, stage = random_images(4), make_stage("evaluate")
    with pytest.raises(DataIntegrityError, match="apgd-ce left the threat model linf:1/10"):
        _run(linear_model, images, _own_labels(linear_model, images), LINF, stage)
    assert files_below(stage.folder) == set(), "verdicts on such images are not kept"


class _AnswersOnce(nn.Module):
    """A model that changes its mind: after ``honest`` calls it answers class 0 for everything."""

    def __init__(self, model: nn.Module, honest: int) -> None:
        super().__init__()
        self.model, self.honest, self.calls = model, honest, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        logits = self.model(images)
        return logits if self.calls <= self.honest else logits * 0 + torch.eye(10)[0]


def test_a_verdict_is_the_models_own_answer_to_the_adversarial_image(make_stage: MakeStage) -> None:
    """An image counts as broken only if the model, asked once more, gives another class: every attacked image is run again."""
    counted = _AnswersOnce(random_linear(), honest=10**9)
    images = random_images(4)
    labels = _own_labels(counted.model, images)
    _run(counted, images, labels, LINF, make_stage("evaluate", k="count"))
    last = _AnswersOnce(counted.model, honest=counted.calls - 1)
    broken = _run(last, images, labels, LINF, make_stage("evaluate", k="last"))
    assert last.calls == counted.calls
    final = [hits for hits in broken.values() if hits.any()][-1]
    assert set(final[labels.numpy() == 0].tolist()) <= {False}
