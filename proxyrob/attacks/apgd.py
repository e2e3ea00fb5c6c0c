"""Auto-PGD (Croce and Hein 2020, «Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks», algorithm 1), on the cross-entropy and, aimed at one class after another, on a difference of logits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks.standing import Attacked, Confirm, RowState, Standing, believe
from proxyrob.device import eval_mode, frozen
from proxyrob.threat import Threat

STEPS = 100
MOMENTUM = 0.75
RISING_SHARE = 0.75
"""Where the loss rose in no more than this share of the steps since the last look, the step size is halved."""

Loss = Callable[[Float[Tensor, "b k"], Int64[Tensor, " b"], Int64[Tensor, " b"]], Float[Tensor, " b"]]
"""Of the logits, the labels and the classes aimed at, for each image."""


def cross_entropy(
    logits: Float[Tensor, "b k"], labels: Int64[Tensor, " b"], targets: Int64[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """The cross-entropy with the label; it is aimed at no class."""
    return F.cross_entropy(logits, labels, reduction="none")


def targeted_dlr(
    logits: Float[Tensor, "b k"], labels: Int64[Tensor, " b"], targets: Int64[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """−(z_y − z_t) / (z_(1) − (z_(3) + z_(4)) / 2) with the sorted logits z_(1) ≥ z_(2) ≥ …: the targeted difference of
    logits ratio (equation 7 of the paper), which no scaling of the logits changes. It needs four classes."""
    ordered = logits.sort(dim=1).values
    spread = ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + 1e-12
    return targeted_margin(logits, labels, targets) / spread


def targeted_margin(
    logits: Float[Tensor, "b k"], labels: Int64[Tensor, " b"], targets: Int64[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """z_t − z_y, for which two classes are enough."""
    return -(logits.gather(1, labels[:, None]) - logits.gather(1, targets[:, None])).squeeze(1)


def attack_apgd(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    labels: Int64[Tensor, " b"],
    threat: Threat,
    *,
    generator: torch.Generator,
    steps: int = STEPS,
    confirm: Confirm = believe,
) -> Attacked:
    """Climb the cross-entropy once from a random start; ``images`` have to be classified correctly.

    Randomness: the start of every image, from ``generator`` (on the CPU).
    """
    standing = Standing(images, labels, confirm)
    with eval_mode(model), frozen(model):
        _climb(model, images, labels, labels, cross_entropy, threat, steps, generator, standing)
    return standing.outcome()


def attack_apgd_targeted(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    labels: Int64[Tensor, " b"],
    threat: Threat,
    *,
    num_targets: int,
    generator: torch.Generator,
    loss: Loss = targeted_dlr,
    steps: int = STEPS,
    confirm: Confirm = believe,
) -> Attacked:
    """Climb ``loss`` towards the class that is the second most likely for the unperturbed image, then towards the third and
    so on, ``num_targets`` in all, on what still stands each time; ``images`` have to be classified correctly.

    Randomness: the start of every image that stands, for each target, from ``generator`` (on the CPU).
    """
    standing = Standing(images, labels, confirm)
    with eval_mode(model), frozen(model):
        with torch.no_grad():
            order = model(images).argsort(dim=1)
        for rank in range(2, num_targets + 2):
            if len(standing.rows):
                _climb(model, images, labels, order[:, -rank], loss, threat, steps, generator, standing)
    return standing.outcome()


@dataclass
class _Climb(RowState):
    """How far the climb is: one row for each image that still stands. ``lower`` and ``upper`` bound its pixels."""

    rows: Int64[Tensor, " m"]
    images: Float[Tensor, "m c h w"]
    lower: Float[Tensor, "m c h w"]
    upper: Float[Tensor, "m c h w"]
    labels: Int64[Tensor, " m"]
    targets: Int64[Tensor, " m"]
    step_size: Float[Tensor, "m 1 1 1"]
    point: Float[Tensor, "m c h w"]
    before: Float[Tensor, "m c h w"]
    gradient: Float[Tensor, "m c h w"]
    loss: Float[Tensor, " m"]
    rises: Float[Tensor, " m"]
    best_point: Float[Tensor, "m c h w"]
    best_gradient: Float[Tensor, "m c h w"]
    best_loss: Float[Tensor, " m"]
    best_at_look: Float[Tensor, " m"]
    was_halved: Bool[Tensor, " m"]


def _climb(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    labels: Int64[Tensor, " b"],
    targets: Int64[Tensor, " b"],
    loss: Loss,
    threat: Threat,
    steps: int,
    generator: torch.Generator,
    standing: Standing,
) -> None:
    """Attack every image that stands once. One that is broken leaves; what the others see does not depend on it."""
    climb = _begin(images, labels, targets, threat, generator, standing.rows)
    look_in = period = max(int(0.22 * steps), 1)
    shortest, shorter = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    for step in range(steps + 1):
        point = climb.point.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = model(point)
            losses = loss(logits, climb.labels, climb.targets)
        fooled = logits.detach().argmax(dim=1) != climb.labels
        if step < steps and not bool(fooled.all()):
            climb.gradient = torch.autograd.grad(losses.sum(), point)[0].contiguous()
        losses = losses.detach()
        standing_now = standing.break_with(climb.rows, climb.point, fooled)
        climb.keep(standing_now)
        if step == steps or not len(climb.rows):
            return
        _remember(climb, losses[standing_now], first=step == 0)
        if step > 0:
            look_in -= 1
        if look_in == 0:
            _look(climb, period)
            look_in = period = max(period - shorter, shortest)
        _step(climb, threat, first=step == 0)


def _begin(
    images: Float[Tensor, "b c h w"],
    labels: Int64[Tensor, " b"],
    targets: Int64[Tensor, " b"],
    threat: Threat,
    generator: torch.Generator,
    rows: Int64[Tensor, " m"],
) -> _Climb:
    """A random start at distance ε of every image in ``rows``, drawn for all of them at once."""
    x, epsilon = images[rows], float(threat.epsilon)
    if threat.norm == "linf":
        noise = (2 * torch.rand(x.shape, generator=generator) - 1).to(x.device)
        noise = noise / (noise.flatten(1).abs().amax(1).view(-1, 1, 1, 1) + 1e-12)
        lower, upper = (x - epsilon).clamp_min_(0.0), (x + epsilon).clamp_max_(1.0)
    else:
        noise = _unit(torch.randn(x.shape, generator=generator).to(x.device))
        lower, upper = torch.zeros_like(x), torch.ones_like(x)
    point = (x + epsilon * noise).clamp_(0.0, 1.0)
    nothing = torch.zeros(len(rows), device=x.device)
    return _Climb(
        rows=rows,
        images=x,
        lower=lower,
        upper=upper,
        labels=labels[rows],
        targets=targets[rows],
        step_size=torch.full((len(rows), 1, 1, 1), 2.0 * epsilon, device=x.device),
        point=point,
        before=point,
        gradient=torch.zeros_like(x),
        loss=nothing,
        rises=nothing,
        best_point=point,
        best_gradient=torch.zeros_like(x),
        best_loss=nothing,
        best_at_look=nothing,
        was_halved=torch.ones(len(rows), dtype=torch.bool, device=x.device),
    )


def _remember(climb: _Climb, losses: Float[Tensor, " m"], *, first: bool) -> None:
    """Count rises of the loss, and keep the point where it was highest.

    **Differs from the source:** the first step counts as a rise where its loss is above 0, whatever it was at the start, as
    in the authors' program.
    """
    if first:
        climb.best_gradient, climb.best_loss, climb.best_at_look = climb.gradient, losses, losses
        return
    climb.rises = climb.rises + (losses > climb.loss)
    climb.loss = losses
    better = losses > climb.best_loss
    climb.best_point = torch.where(better.view(-1, 1, 1, 1), climb.point, climb.best_point)
    climb.best_gradient = torch.where(better.view(-1, 1, 1, 1), climb.gradient, climb.best_gradient)
    climb.best_loss = torch.where(better, losses, climb.best_loss)


def _look(climb: _Climb, period: int) -> None:
    """Halve the step size and go back to the best point where the loss rose too rarely, or where it is no better than at
    the last look although the step size was not halved then."""
    stuck = ~climb.was_halved & (climb.best_at_look >= climb.best_loss)
    halve = (climb.rises <= period * RISING_SHARE) | stuck
    climb.was_halved, climb.best_at_look, climb.rises = halve, climb.best_loss, torch.zeros_like(climb.rises)
    back = halve.view(-1, 1, 1, 1)
    climb.step_size = torch.where(back, climb.step_size / 2.0, climb.step_size)
    climb.point = torch.where(back, climb.best_point, climb.point)
    climb.gradient = torch.where(back, climb.best_gradient, climb.gradient)


def _step(climb: _Climb, threat: Threat, *, first: bool) -> None:
    """One step along the gradient, mixed with the last movement."""
    ahead = 1.0 if first else MOMENTUM
    x, point = climb.images, climb.point
    movement = (point - climb.before) * (1 - ahead)
    if threat.norm == "linf":
        tried = _clip(point + climb.step_size * climb.gradient.sign(), climb)
        tried = _clip(point + (tried - point) * ahead + movement, climb)
    else:
        epsilon = float(threat.epsilon)
        tried = _into_ball(point + climb.step_size * _unit(climb.gradient), x, epsilon)
        tried = _into_ball(point + (tried - point) * ahead + movement, x, epsilon)
    climb.before, climb.point = point, tried


def _clip(point: Float[Tensor, "m c h w"], climb: _Climb) -> Float[Tensor, "m c h w"]:
    return torch.clamp(point, climb.lower, climb.upper)


def _into_ball(point: Float[Tensor, "m c h w"], x: Float[Tensor, "m c h w"], epsilon: float) -> Float[Tensor, "m c h w"]:
    delta = point - x
    return (x + _unit(delta) * _length(delta).clamp_max(epsilon)).clamp_(0.0, 1.0)


def _unit(delta: Float[Tensor, "m c h w"]) -> Float[Tensor, "m c h w"]:
    return delta / (_length(delta) + 1e-12)


def _length(delta: Float[Tensor, "m c h w"]) -> Float[Tensor, "m 1 1 1"]:
    return delta.square().flatten(1).sum(1).sqrt().view(-1, 1, 1, 1)
