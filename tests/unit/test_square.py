"""Square: what it proposes, what it accepts, and how the model is read."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proxyrob.attacks import attack_square, square
from proxyrob.attacks.square import _pyramid, _side
from proxyrob.threat import Threat, parse_threat
from tests.toys import Watched, answers, breakable, largest_norm, middle_images, random_linear, same_rows

LINF, L2 = parse_threat("linf:0.06"), parse_threat("l2:0.4")
IMAGES = middle_images(24)
MODEL = random_linear(classes=4)
LABELS = answers(MODEL, IMAGES)


def _attack(model: nn.Module = MODEL, threat: Threat = LINF, queries: int = 300, seed: int = 5, **given: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return attack_square(model, IMAGES, LABELS, threat, queries=queries, generator=generator, **given)


@pytest.mark.parametrize("threat", [LINF, L2])
def test_what_is_found_is_adversarial_and_inside(threat: Threat) -> None:
    """Nothing that cannot be broken is; what is broken is so by a perturbation inside the threat model, the others are given
    back as they were."""
    found = _attack(threat=threat)
    assert not bool((found.broken & ~breakable(MODEL, IMAGES, threat)).any())
    assert 4 < int(found.broken.sum()) < 24
    assert largest_norm(found.images, IMAGES, threat) <= float(threat.epsilon) + 1e-6
    assert ((answers(MODEL, found.images) != LABELS) == found.broken).all()
    assert torch.equal(found.images[~found.broken], IMAGES[~found.broken])


def test_who_leaves_changes_nothing_for_who_stays() -> None:
    """In L∞ all images see the same squares: those that withstand are shown at the points at which they would be if nobody
    left."""
    watched = Watched(MODEL)
    stands = ~_attack(watched).broken
    shown = watched.take()
    _attack(watched, confirm=lambda images, labels: torch.zeros(len(images), dtype=torch.bool))
    if_nobody_left = torch.stack([batch for batch in watched.shown if len(batch) == len(IMAGES)])
    assert len(if_nobody_left) == 301
    assert len(shown) < 301 * len(IMAGES)
    assert same_rows(if_nobody_left[:, stands].flatten(0, 1), shown)


@pytest.mark.parametrize("threat", [LINF, L2])
def test_an_image_that_is_not_confirmed_goes_on_being_attacked(threat: Threat) -> None:
    """Without confirmation nothing is broken; what is shown to be confirmed is misclassified, and better each time."""
    margins: list[float] = []

    def refuse(images: Tensor, labels: Tensor) -> Tensor:
        assert (answers(MODEL, images) != labels).all()
        if labels[0] == LABELS[0]:
            margins.append(float((MODEL(images[:1])[0, labels[0]]).detach()))
        return torch.zeros(len(images), dtype=torch.bool)

    found = _attack(threat=threat, confirm=refuse)
    assert margins
    assert not bool(found.broken.any())
    assert torch.equal(found.images, IMAGES)


def test_squares_shrink_by_the_schedule_of_the_source() -> None:
    """0.8 of a 32×32 image, halved after 10, 50, 200, 500, 1000, 2000 and 4000 queries, and a pixel at least."""
    sides = [_side(query, 32, 32, 1) for query in (0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001)]
    assert sides == [29, 29, 20, 20, 14, 14, 10, 10, 7, 7, 5, 5, 4, 4, 3]
    assert (_side(4999, 8, 8, 1), _side(4999, 8, 8, 3)) == (1, 3)


def test_a_pyramid_is_highest_in_the_middle_and_of_length_one() -> None:
    """Equal on squares around the middle, falling outwards."""
    pyramid = _pyramid(5, 5)
    assert float(pyramid.square().sum()) == pytest.approx(1.0)
    assert pyramid[2, 2] > pyramid[1, 2] > pyramid[0, 2] > 0
    assert torch.equal(pyramid[1, 1:4], pyramid[1:4, 1])
    assert torch.equal(pyramid, pyramid.flip(0, 1))


def test_images_too_small_for_a_checkerboard_are_refused() -> None:
    """In L2 the first perturbation has five tiles in each direction."""
    images, model = middle_images(2, shape=(1, 8, 4)), random_linear(pixels=32)
    with pytest.raises(ValueError, match=r"at least 5×5 pixels, got \(8, 4\)"):
        attack_square(model, images, answers(model, images), L2, generator=torch.Generator(), queries=1)


@pytest.mark.parametrize("side", [8, 9, 14, 15])
def test_any_larger_image_has_its_checkerboard(side: int) -> None:
    """Also where tiles do not fill the image, or reach beyond it."""
    images, model = middle_images(3, shape=(2, side, side + 1)), random_linear(pixels=2 * side * (side + 1))
    found = attack_square(model, images, answers(model, images), L2, generator=torch.Generator().manual_seed(0), queries=20)
    assert largest_norm(found.images, images, L2) <= float(L2.epsilon) + 1e-6


def test_windows_are_followed_where_that_saves_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read whole or by what a square changed, the verdicts and the adversarial images are the same, but for rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 4)
    )
    labels, generators = answers(model, IMAGES), [torch.Generator().manual_seed(0) for _ in range(2)]
    read: list[int] = []
    whole = attack_square(model, IMAGES, labels, LINF, queries=300, generator=generators[0])
    monkeypatch.setattr(square, "WORTHWHILE_OPERATIONS", 1)
    original = square.WindowedModel.read
    monkeypatch.setattr(square.WindowedModel, "read", lambda *given: read.append(1) or original(*given))
    windowed = attack_square(model, IMAGES, labels, LINF, queries=300, generator=generators[1])
    assert len(read) > 50
    assert windowed.broken.tolist() == whole.broken.tolist()
    assert 0 < int(whole.broken.sum()) < len(IMAGES)
    assert torch.allclose(windowed.images, whole.images, atol=1e-5)
