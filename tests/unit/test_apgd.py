"""Auto-PGD on models whose optimum is known, and what leaves a batch or goes on standing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proxyrob.attacks import Attacked, attack_apgd, attack_apgd_targeted, targeted_dlr, targeted_margin
from proxyrob.threat import Threat, parse_threat
from tests.toys import Watched, answers, breakable, largest_norm, middle_images, random_linear, same_rows, same_state

LINF, L2 = parse_threat("linf:0.03"), parse_threat("l2:0.15")
IMAGES = middle_images(24)
MODEL = random_linear(classes=4)
LABELS = answers(MODEL, IMAGES)


def _climb(model: nn.Module = MODEL, threat: Threat = LINF, **given: Any) -> Attacked:
    return attack_apgd(model, IMAGES, LABELS, threat, generator=torch.Generator().manual_seed(3), **given)


def _aim(model: nn.Module = MODEL, threat: Threat = LINF, num_targets: int = 3, **given: Any) -> Attacked:
    generator = torch.Generator().manual_seed(3)
    return attack_apgd_targeted(model, IMAGES, LABELS, threat, num_targets=num_targets, generator=generator, **given)


def _aim_once(model: nn.Module = MODEL, threat: Threat = LINF, **given: Any) -> Attacked:
    return _aim(model, threat, 1, **given)


@pytest.mark.parametrize("threat", [LINF, L2])
@pytest.mark.parametrize("loss", [targeted_dlr, targeted_margin])
def test_exactly_the_images_that_can_be_broken_are(threat: Threat, loss: Callable[..., Tensor]) -> None:
    """On a linear model the best perturbation towards each class is known: aimed at all the others, every image that can be
    broken is, and no other."""
    expected = breakable(MODEL, IMAGES, threat)
    assert 4 < int(expected.sum()) < 20, "the toy shows nothing unless some images can be broken and some cannot"
    assert _aim(threat=threat, loss=loss).broken.tolist() == expected.tolist()


@pytest.mark.parametrize("threat", [LINF, L2])
@pytest.mark.parametrize("attack", [_climb, _aim])
def test_what_is_found_is_adversarial_and_inside(threat: Threat, attack: Callable[..., Attacked]) -> None:
    """An image counts as broken by a perturbation inside the threat model; the others are given back as they were."""
    found = attack(threat=threat)
    assert largest_norm(found.images, IMAGES, threat) <= float(threat.epsilon) + 1e-6
    assert ((answers(MODEL, found.images) != LABELS) == found.broken).all()
    assert torch.equal(found.images[~found.broken], IMAGES[~found.broken])
    assert int(found.broken.sum()) > 4


@pytest.mark.parametrize("attack", [_climb, _aim_once])
def test_who_leaves_changes_nothing_for_who_stays(attack: Callable[..., Attacked]) -> None:
    """Images that withstand are shown to the model at the very points at which they would be if nobody left: random numbers
    are drawn for the whole batch."""
    watched = Watched(MODEL)
    stands = ~attack(watched).broken
    shown = watched.take()
    attack(watched, confirm=lambda images, labels: torch.zeros(len(images), dtype=torch.bool))
    if_nobody_left = watched.take()
    assert len(shown) < len(if_nobody_left)
    expected = if_nobody_left.view(-1, len(IMAGES), 64)[:, stands]
    assert 4 < int(stands.sum()) < 20
    assert same_rows(expected.flatten(0, 1), shown)


@pytest.mark.parametrize(("attack", "readings"), [(_climb, 101), (_aim, 1 + 3 * 101)])
def test_an_image_that_is_not_confirmed_goes_on_being_attacked(attack: Callable[..., Attacked], readings: int) -> None:
    """Without confirmation nothing is broken, however often the model errs, and every step is made on every image."""
    asked: list[int] = []

    def refuse(images: Tensor, labels: Tensor) -> Tensor:
        asked.append(len(images))
        return torch.zeros(len(images), dtype=torch.bool)

    watched = Watched(MODEL)
    found = attack(watched, confirm=refuse)
    assert sum(asked) > 100
    assert not bool(found.broken.any())
    assert torch.equal(found.images, IMAGES)
    assert len(watched.take()) == readings * len(IMAGES)


def test_the_generator_alone_decides() -> None:
    """Global random state is neither read nor moved, and the model's weights and modes are as they were."""
    model = nn.Sequential(random_linear(classes=4), nn.Dropout(0.5)).train()
    before, weights = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (_climb(model) for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert same_state(weights, model.state_dict())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("classes", [2, 3])
def test_the_margin_needs_two_classes(classes: int) -> None:
    """Aimed at all other classes, it finds all that can be found."""
    model = random_linear(classes=classes)
    labels, generator = answers(model, IMAGES), torch.Generator().manual_seed(0)
    found = attack_apgd_targeted(
        model, IMAGES, labels, LINF, num_targets=classes - 1, generator=generator, loss=targeted_margin
    )
    assert found.broken.tolist() == breakable(model, IMAGES, LINF).tolist()
