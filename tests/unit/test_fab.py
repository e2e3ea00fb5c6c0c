"""FAB on models whose nearest adversarial point is known, and its projection onto a plane."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from proxyrob.attacks import Attacked, attack_fab, fab
from proxyrob.attacks.fab import project_onto_plane
from proxyrob.threat import Norm, Threat, parse_threat
from tests.toys import Watched, answers, breakable, largest_norm, middle_images, random_linear, same_rows

LINF, L2 = parse_threat("linf:0.03"), parse_threat("l2:0.15")
IMAGES = middle_images(24)
MODEL = random_linear(classes=4)
LABELS = answers(MODEL, IMAGES)
NORMS: list[Norm] = ["linf", "l2"]


def _size(delta: Tensor, norm: Norm) -> Tensor:
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


@pytest.mark.parametrize("threat", [LINF, L2])
def test_exactly_the_images_that_can_be_broken_are(threat: Threat) -> None:
    """On a linear model the nearest point of another class is known: every image that can be broken within ε is, by an
    adversarial point inside the threat model, and the others are given back as they were."""
    found = attack_fab(MODEL, IMAGES, LABELS, threat, num_targets=3, steps=30)
    expected = breakable(MODEL, IMAGES, threat)
    assert 4 < int(expected.sum()) < 20, "the toy shows nothing unless some images can be broken and some cannot"
    assert found.broken.tolist() == expected.tolist()
    assert largest_norm(found.images, IMAGES, threat) <= float(threat.epsilon) + 1e-6
    assert ((answers(MODEL, found.images) != LABELS) == found.broken).all()
    assert torch.equal(found.images[~found.broken], IMAGES[~found.broken])


def _refuse(images: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros(len(images), dtype=torch.bool)


def test_who_leaves_changes_nothing_for_who_stays() -> None:
    """Images that withstand are shown to the model at the very points at which they would be if nobody left."""
    watched = Watched(MODEL)
    stands = ~attack_fab(watched, IMAGES, LABELS, LINF, num_targets=3, steps=30).broken
    shown = watched.take()
    attack_fab(watched, IMAGES[stands], LABELS[stands], LINF, num_targets=3, steps=30, confirm=_refuse)
    alone = watched.take()
    assert 4 < int(stands.sum()) < 20
    assert len(alone) < len(shown)
    assert same_rows(alone, shown)


def test_an_image_that_is_not_confirmed_goes_on_being_attacked() -> None:
    """Without confirmation nothing is broken, and every step is made on every image."""
    confirmed: list[int] = []

    def refuse(images: Tensor, labels: Tensor) -> Tensor:
        confirmed.append(len(images))
        return _refuse(images, labels)

    found: Attacked = attack_fab(MODEL, IMAGES, LABELS, LINF, num_targets=3, steps=30, confirm=refuse)
    assert sum(confirmed) > 100
    assert not bool(found.broken.any())


def test_a_point_where_the_search_goes_on_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step ends inside, the next one begins there, and its gradient is mostly taken of the same reading; what is
    found is the same."""
    torch.manual_seed(1)
    layers = [nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
    watched = Watched(nn.Sequential(*layers).requires_grad_(False))
    for parameter in watched.parameters():
        parameter.mul_(3)
    images, labels = IMAGES[:8], answers(watched, IMAGES[:8])
    watched.take()
    found, shown = [], []
    for large in (65, 64):
        monkeypatch.setattr(fab, "LARGE_IMAGE", large)
        found.append(attack_fab(watched, images, labels, parse_threat("linf:0.05"), num_targets=1).broken.tolist())
        watched.take()
        attack_fab(watched, images, labels, parse_threat("linf:0.0001"), num_targets=1)
        shown.append(len(watched.take()))
    assert shown[0] == (1 + 2 * 100) * 8
    assert 100 * 8 < shown[1] < 0.9 * shown[0]
    assert found[0] == found[1]
    assert 0 < sum(found[0]) < 8


@st.composite
def _planes(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    pixels, seed = draw(st.integers(1, 12)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand((6, pixels), generator=generator)
    weight = torch.randn((6, pixels), generator=generator) * 10.0 ** draw(st.integers(-2, 2))
    weight[torch.rand((6, pixels), generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = 0.0
    goal = torch.rand((6, pixels), generator=generator)  # a point of [0,1] through which the plane goes
    return points, weight, (weight * goal).sum(1)


@given(_planes(), st.sampled_from(NORMS))
def test_a_projection_is_on_the_plane_inside_and_nearest(planes: tuple[Tensor, Tensor, Tensor], norm: Norm) -> None:
    """It lies on the plane and in [0,1], and is no longer than any other way there; pixels without weight do not move."""
    points, weight, offset = planes
    delta = project_onto_plane(points, weight, offset, norm)
    reached = points + delta
    scale = weight.abs().sum(1) + 1e-6
    assert bool((((weight * reached).sum(1) - offset).abs() <= 1e-5 * scale).all())
    assert -1e-6 <= float(reached.min()) <= float(reached.max()) <= 1 + 1e-6
    assert bool((delta[weight == 0] == 0).all())
    for _ in range(5):  # another point of [0,1] on the plane: on the way from the projection to any that is on it
        other = torch.rand(points.shape, generator=torch.Generator().manual_seed(_))
        beyond = (weight * other).sum(1) - offset
        before = (weight * points).sum(1) - offset
        crosses = beyond * before < 0
        share = (before / (before - beyond))[:, None]
        length = _size((other - points) * share, norm)
        assert bool((_size(delta, norm)[crosses] <= length[crosses] + 1e-5).all())


@pytest.mark.parametrize("norm", NORMS)
def test_a_plane_outside_is_approached_as_far_as_possible(norm: Norm) -> None:
    """Where no point of [0,1] lies on the plane, every pixel with weight goes to its edge."""
    points, weight = torch.tensor([[0.2, 0.5, 0.9]]), torch.tensor([[1.0, -2.0, 0.0]])
    up, down = (points + project_onto_plane(points, weight, torch.tensor([offset]), norm) for offset in (9.0, -9.0))
    assert torch.allclose(up, torch.tensor([[1.0, 0.0, 0.9]]))
    assert torch.allclose(down, torch.tensor([[0.0, 1.0, 0.9]]))
