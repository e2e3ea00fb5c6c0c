"""Adversarial images in files: read again to the last bit, and believed only then."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from proxyrob.attacks import Attacked
from proxyrob.errors import DataIntegrityError
from proxyrob.evaluate import AdversarialHeader, AdversarialImages, read_adversarial, read_adversarial_header
from proxyrob.evaluate.adversarial import check_inside, read_unit, tabulate_unit, write_adversarial
from proxyrob.threat import Threat, parse_threat
from tests.toys import Linear, answers, random_images, random_linear

LINF, L2 = parse_threat("linf:0.1"), parse_threat("l2:0.3")
ROWS = np.array([3, 5, 8, 11])


def _header(shape: tuple[int, int, int] = (3, 5, 4)) -> AdversarialHeader:
    return AdversarialHeader(norm="linf", epsilon="1/10", split="test", image_shape=shape, model="abc", data_sha256="def")


def _images(attack: str, first: int, count: int) -> AdversarialImages:
    indices = np.arange(first, first + count)
    return AdversarialImages(attack, indices, indices % 10, random_images(count, shape=(3, 5, 4), seed=first))


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    """Pixels to the last bit, also the least float there is, with index, label and attack; parts without images leave none."""
    parts = [_images("apgd-ce", 0, 3), _images("apgd-t", 3, 0), _images("square", 7, 1)]
    parts[0].images[0, 0, 0, :3] = torch.tensor([float(np.finfo(np.float32).smallest_subnormal), 1.0, 1 / 3])
    path = tmp_path / "adversarial.parquet"
    write_adversarial(path, parts, _header())
    found = list(read_adversarial(path))
    assert read_adversarial_header(path) == _header()
    assert [part.attack for part in found] == ["apgd-ce", "square"]
    for part, expected in zip(found, (parts[0], parts[2]), strict=True):
        assert (part.indices.tolist(), part.labels.tolist()) == (expected.indices.tolist(), expected.labels.tolist())
        assert torch.equal(part.images, expected.images)


def test_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    """A run that was killed and one that was not end with the same file."""
    for name in ("one", "other"):
        write_adversarial(tmp_path / name, [_images("apgd-ce", 0, 3)], _header())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_file_without_images_can_be_read(tmp_path: Path) -> None:
    """A model that nothing broke has an empty one."""
    write_adversarial(tmp_path / "none", [], _header())
    assert list(read_adversarial(tmp_path / "none")) == []


def _attacked(model: Linear, broken: list[bool], epsilon: float = 0.1) -> tuple[torch.Tensor, torch.Tensor, Attacked]:
    """Images, labels, and a step of ε against the label's weights for those that are claimed to be broken."""
    images = 0.3 + 0.4 * random_images(4)
    labels = answers(model, images)
    step = -epsilon * model.weight.detach()[labels].sign().view_as(images)
    claimed = torch.tensor(broken)
    return images, labels, Attacked(torch.where(claimed[:, None, None, None], images + step, images), claimed)


def test_a_unit_holds_what_the_model_itself_confirms(linear_model: Linear) -> None:
    """Of four images three are claimed to be broken, and two are: those alone count, and have their pixels in the unit."""
    images, labels, attacked = _attacked(linear_model, [True, True, False, True])
    attacked.images[1] = images[1]
    unit = tabulate_unit(linear_model, ROWS, images, labels, attacked, LINF, "square")
    assert unit["index"].to_pylist() == ROWS.tolist()
    assert unit["broken"].to_pylist() == [True, False, False, True]
    assert unit["pixels"].is_valid().to_pylist() == [True, False, False, True]
    all_labels = np.arange(12)
    found = read_unit(unit, "square", all_labels, (1, 8, 8))
    assert (found.indices.tolist(), found.labels.tolist(), found.attack) == ([3, 11], [3, 11], "square")
    assert torch.equal(found.images, attacked.images[[0, 3]])


def test_a_unit_without_broken_images_has_none(linear_model: Linear) -> None:
    """Nothing claimed, nothing stored."""
    images, labels, attacked = _attacked(linear_model, [False] * 4)
    unit = tabulate_unit(linear_model, ROWS, images, labels, attacked, LINF, "square")
    assert unit["broken"].to_pylist() == [False] * 4
    assert len(read_unit(unit, "square", np.arange(12), (1, 8, 8))) == 0


def test_the_model_is_asked_in_eval_mode(linear_model: Linear) -> None:
    """Dropout in a model that was left in training mode does not break an image."""
    model = nn.Sequential(linear_model, nn.Dropout(0.9)).train()
    images, labels, attacked = _attacked(linear_model, [True] * 4, epsilon=0.0)
    unit = tabulate_unit(model, ROWS, images, labels, attacked, LINF, "square")
    assert unit["broken"].to_pylist() == [False] * 4
    assert model.training


def test_every_claimed_image_is_measured(linear_model: Linear) -> None:
    """What an attack returns is not believed: one that left the threat model fails the unit, broken or not."""
    images, labels, attacked = _attacked(linear_model, [True] * 4, epsilon=0.1001)
    with pytest.raises(DataIntegrityError, match=r"square left the threat model linf:1/10: a perturbation has norm 0\.100"):
        tabulate_unit(random_linear(seed=1), ROWS, images, labels, attacked, LINF, "square")


@pytest.mark.parametrize(("threat", "outside"), [(LINF, 0.1001), (L2, 0.3001)])
def test_an_attack_that_leaves_the_threat_model_is_refused(threat: Threat, outside: float) -> None:
    """One perturbation too large is an error that names attack and norm."""
    images = torch.full((3, 1, 2, 2), 0.5)
    attacked = images.clone()
    attacked[1, 0, 0, 0] += float(threat.epsilon)
    check_inside(attacked, images, threat, "square")
    attacked[1, 0, 0, 0] = 0.4
    attacked[2, 0, 1, 1] -= outside
    with pytest.raises(DataIntegrityError, match=f"square left the threat model {threat}: a perturbation has norm {outside}"):
        check_inside(attacked, images, threat, "square")


@pytest.mark.parametrize("value", [-0.001, 1.001, float("nan"), float("inf")])
def test_an_attack_that_leaves_the_box_is_refused(value: float) -> None:
    """A pixel outside [0,1] or NaN is an error, even where the ball would allow it."""
    images = torch.zeros(2, 1, 2, 2) if value < 0.5 else torch.ones(2, 1, 2, 2)
    attacked = images.clone()
    attacked[1, 0, 0, 1] = value
    with pytest.raises(DataIntegrityError, match=r"fab-t left \[0,1\] or produced NaN"):
        check_inside(attacked, images, LINF, "fab-t")
