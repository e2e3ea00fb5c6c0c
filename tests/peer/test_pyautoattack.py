"""AutoAttack against pyautoattack, whose verdicts are the reference, image by image."""

import io
from contextlib import redirect_stdout
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_projections import projection_l2, projection_linf
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from proxyrob.attacks import attack_apgd, attack_apgd_targeted, attack_fab, attack_square
from proxyrob.attacks.fab import project_onto_plane
from proxyrob.device import eval_mode
from proxyrob.evaluate import STANDARD_ATTACKS, run_autoattack
from proxyrob.models import FoldedCopy, load_classifier
from proxyrob.rng import isolated_rng
from proxyrob.source import Split, read_split
from proxyrob.storage import DataPlace, Stage
from proxyrob.threat import Norm, Threat, parse_threat
from tests.conftest import MakeStage
from tests.toys import Killer, StopHereError, Watched, answers, same_rows

SEED = 12345
NAMES: dict[Norm, Literal["Linf", "L2"]] = {"linf": "Linf", "l2": "L2"}
STEPS, QUERIES = 20, 300


class _Head(nn.Module):
    """A linear model fitted to the digits, small enough that 5,000 queries take a moment."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        for _ in range(200):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(self(split.images), split.targets).backward()
            optimizer.step()

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


def _right(model: nn.Module, split: Split, count: int) -> tuple[Tensor, Tensor]:
    """The first images that a model classifies correctly, with their labels."""
    rows = (answers(model, split.images) == split.targets).nonzero().squeeze(1)[:count]
    return split.images[rows], split.targets[rows]


def _reference(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, batch_size: int) -> dict[str, list[bool]]:
    """What each of pyautoattack's four attacks breaks, one after the other as in one call."""
    standing, broken = torch.arange(len(images)), {}
    with isolated_rng(SEED), eval_mode(model):
        peer = AutoAttack(
            model, device="cpu", eps=float(threat.epsilon), norm=NAMES[threat.norm], seed=SEED, version="standard"
        )
        assert peer.attacks_to_run == list(STANDARD_ATTACKS)
        for attack in STANDARD_ATTACKS:
            hits = torch.zeros(len(images), dtype=torch.bool)
            if len(standing):
                peer.attacks_to_run = [attack]
                with redirect_stdout(io.StringIO()):
                    attacked, _ = peer.run_standard_evaluation(images[standing], labels[standing], batch_size=batch_size)
                hits[standing] = answers(model, attacked) != labels[standing]
            broken[attack] = hits.tolist()
            standing = standing[~hits[standing]]
    return broken


def _compare(model: nn.Module, split: Split, threat: Threat, stage: Stage, *, count: int, batch_size: int) -> dict[str, Any]:
    """Run both, ours killed in between and resumed; the verdicts after every attack have to be equal."""
    images, labels = _right(model, split, count)
    expected = _reference(model, images, labels, threat, batch_size)
    given = {"batch_size": batch_size, "seed": SEED, "units": DataPlace.of(stage.folder)}
    with pytest.raises(StopHereError):
        run_autoattack(model, images, labels, threat, **given, on_progress=Killer(lambda done: done >= 250))
    run = run_autoattack(model, images, labels, threat, **given)
    assert {attack: hits.tolist() for attack, hits in run.broken.items()} == expected
    return expected


@pytest.mark.parametrize("text", ["linf:0.12", pytest.param("l2:0.7", marks=pytest.mark.slow)])
def test_the_whole_ensemble_finds_the_same(text: str, digits: Stage, make_stage: MakeStage) -> None:
    """With all settings of ``AutoAttack(version="standard")``, killed and resumed, in several batches: the verdict of each
    image after each attack is the same."""
    model = _Head(read_split(digits, "train")).eval().requires_grad_(False)
    split = read_split(digits, "test")
    broken = _compare(model, split, parse_threat(text), make_stage("evaluate"), count=9, batch_size=5)
    assert 3 <= sum(map(sum, broken.values())) <= 6, "several images have to break, and several to withstand"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("linf:0.07", "toy_classifier"),
        ("linf:0.05", "other_classifier"),
        ("l2:0.5", "toy_classifier"),
        ("l2:0.3", "other_classifier"),
    ],
)
def test_the_whole_ensemble_finds_the_same_on_networks(
    text: str, network: str, digits: Stage, make_stage: MakeStage, request: pytest.FixtureRequest
) -> None:
    """As above on convolutional networks, one of them with batch normalisation, of which ours reads a folded copy."""
    model = load_classifier(request.getfixturevalue(network))
    split = read_split(digits, "test")
    broken = _compare(model, split, parse_threat(text), make_stage("evaluate"), count=40, batch_size=16)
    assert 8 <= sum(map(sum, broken.values())) <= 32


def _attack_alone(attack: str, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> tuple[Tensor, Tensor]:
    """What one attack alone breaks, pyautoattack's and ours, with fewer steps."""
    peer_given: dict[str, Any] = {"norm": NAMES[threat.norm], "eps": float(threat.epsilon), "seed": SEED, "device": "cpu"}

    def confirm(found: Tensor, own: Tensor) -> Tensor:
        return answers(model, found) != own

    given: dict[str, Any] = {"confirm": confirm}
    search, generator = FoldedCopy(model, example=images[:2]), torch.Generator().manual_seed(SEED)
    match attack:
        case "apgd-ce":
            peer = APGDAttack(model, n_iter=STEPS, n_restarts=1, **peer_given)
            ours = attack_apgd(search, images, labels, threat, steps=STEPS, generator=generator, **given)
        case "apgd-t":
            peer = APGDAttack_targeted(model, n_iter=STEPS, n_target_classes=9, **peer_given)
            ours = attack_apgd_targeted(
                search, images, labels, threat, num_targets=9, steps=STEPS, generator=generator, **given
            )
        case "fab-t":
            peer = FABAttack_PT(model, n_iter=STEPS, n_restarts=1, targeted=True, n_target_classes=9, **peer_given)
            ours = attack_fab(search, images, labels, threat, num_targets=9, steps=STEPS, **given)
        case _:
            peer = SquareAttack(model, n_queries=QUERIES, n_restarts=1, p_init=0.8, resc_schedule=False, **peer_given)
            ours = attack_square(search, images, labels, threat, queries=QUERIES, generator=generator, **given)
    with isolated_rng(SEED), eval_mode(model), redirect_stdout(io.StringIO()):
        attacked = peer.perturb(images, labels)
    return answers(model, attacked) != labels, ours.broken


@pytest.mark.parametrize("attack", STANDARD_ATTACKS)
@pytest.mark.parametrize(
    ("network", "text"),
    [
        ("toy_classifier", "linf:0.1"),
        ("toy_classifier", "l2:0.6"),
        ("other_classifier", "linf:0.06"),
        ("other_classifier", "l2:0.3"),
    ],
)
def test_each_attack_alone_finds_the_same(
    attack: str, network: str, text: str, digits: Stage, request: pytest.FixtureRequest
) -> None:
    """Run on all images rather than on what others left, so that each has something to find; with fewer steps, and ours on a
    folded copy in the channels_last layout."""
    model = load_classifier(request.getfixturevalue(network))
    images, labels = _right(model, read_split(digits, "test"), 24)
    theirs, ours = _attack_alone(attack, model, images, labels, parse_threat(text))
    assert ours.tolist() == theirs.tolist()
    assert 3 <= int(theirs.sum()) <= 21, "the toy shows nothing unless some images break and some withstand"


@pytest.mark.parametrize("text", ["linf:0.1", "l2:0.6"])
@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-t", "square"])
def test_images_that_withstand_are_shown_at_the_very_same_points(attack: str, text: str, digits: Stage) -> None:
    """Same random numbers, same steps: all that pyautoattack asks of them ours asks too, to the last bit."""
    head = _Head(read_split(digits, "train")).eval().requires_grad_(False)
    images, labels = _right(head, read_split(digits, "test"), 12)
    model, threat = Watched(head), parse_threat(text)
    generator = torch.Generator().manual_seed(SEED)
    given: dict[str, Any] = {"generator": generator}
    peer_given: dict[str, Any] = {"norm": NAMES[threat.norm], "eps": float(threat.epsilon), "seed": SEED, "device": "cpu"}
    match attack:
        case "apgd-ce":
            peer = APGDAttack(model, n_iter=100, n_restarts=1, **peer_given)
            ours = attack_apgd(model, images, labels, threat, **given)
        case "apgd-t":
            peer = APGDAttack_targeted(model, n_iter=100, n_target_classes=9, **peer_given)
            ours = attack_apgd_targeted(model, images, labels, threat, num_targets=9, **given)
        case _:
            peer = SquareAttack(model, n_queries=QUERIES, n_restarts=1, p_init=0.8, resc_schedule=False, **peer_given)
            ours = attack_square(model, images, labels, threat, queries=QUERIES, **given)
    asked_by_us = model.take()
    with isolated_rng(SEED), redirect_stdout(io.StringIO()):
        peer.perturb(images, labels)
    asked_by_them, stand = model.take(), images[~ours.broken].flatten(1)
    assert 3 <= len(stand) <= 11
    delta = asked_by_them[:, None] - stand
    length = delta.abs().amax(2) if threat.norm == "linf" else delta.norm(dim=2)
    nearest = length.amin(1)
    about_them = asked_by_them[(nearest > 0) & (nearest <= float(threat.epsilon) + 1e-5)]  # without the unperturbed images
    assert len(about_them) > len(stand) * 100
    assert same_rows(about_them, asked_by_us)


@given(st.integers(0, 2**31), st.integers(1, 20), st.sampled_from(["linf", "l2"]))
def test_projections_are_the_same(seed: int, pixels: int, norm: Norm) -> None:
    """Onto planes inside the box, at its edge and outside, for pixels with and without weight."""
    generator = torch.Generator().manual_seed(seed)
    points, weight = torch.rand((8, pixels), generator=generator), torch.randn((8, pixels), generator=generator)
    points = torch.where(torch.rand((8, pixels), generator=generator) < 0.2, points.round(), points)
    weight = torch.where(torch.rand((8, pixels), generator=generator) < 0.2, 0.0, weight)
    offset = (weight * torch.rand((8, pixels), generator=generator)).sum(1) * torch.linspace(0.5, 2.0, 8)
    theirs = (projection_linf if norm == "linf" else projection_l2)(points, weight, offset)
    assert torch.allclose(project_onto_plane(points, weight, offset, norm), theirs, atol=1e-5)
