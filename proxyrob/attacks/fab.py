"""FAB (Croce and Hein 2020, «Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary Attack»), aimed at one
class after another.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from proxyrob.attacks.standing import Attacked, Confirm, RowState, Standing, believe
from proxyrob.device import eval_mode, frozen
from proxyrob.threat import Norm, Threat

STEPS = 100
MOST_BIASED = 0.1
"""Largest weight of the projection of the unperturbed image (α_max)."""

OVERSHOOT = 1.05
"""How far beyond the projection a step goes (η)."""

STEP_BACK = 0.9
"""Where on the way from the image to an adversarial point the search goes on (β)."""

LARGE_IMAGE = 1024
"""Values of an image from which on a reading saved is worth more than the bookkeeping."""

SMALLEST_WEIGHT = 1e-8
"""In L2, pixels whose weight in the hyperplane is no larger do not move."""


def attack_fab(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    labels: Int64[Tensor, " b"],
    threat: Threat,
    *,
    num_targets: int,
    steps: int = STEPS,
    confirm: Confirm = believe,
) -> Attacked:
    """Look for the nearest point of the class that is the second most likely for the unperturbed image, then of the third
    and so on, ``num_targets`` in all, on what still stands each time; ``images`` have to be classified correctly.

    An image is broken by the first adversarial point within ε: that a nearer one would follow changes no verdict. The attack
    is not random.
    """
    standing = Standing(images, labels, confirm)
    with eval_mode(model), frozen(model), torch.no_grad():
        order = model(images).argsort(dim=1)
        for rank in range(2, num_targets + 2):
            if len(rows := standing.rows):
                search = _Search(
                    rows=rows,
                    images=images[rows],
                    labels=labels[rows],
                    targets=order[rows, -rank],
                    point=images[rows],
                    adversarial=torch.zeros_like(rows, dtype=torch.bool),
                    linearised=torch.zeros_like(rows, dtype=torch.bool),
                    weight=torch.zeros(len(rows), images[0].numel(), device=images.device),
                    offset=torch.zeros(len(rows), device=images.device),
                )
                _search(model, search, threat, steps, standing)
    return standing.outcome()


@dataclass
class _Search(RowState):
    """How far the search is: one row for each image that still stands.

    Where ``linearised``, the hyperplane ⟨weight, z⟩ = offset is the one on which the logits of label and target are equal,
    linearised at the point. ``adversarial`` says of the last step that it ended on an adversarial point.
    """

    rows: Int64[Tensor, " m"]
    images: Float[Tensor, "m c h w"]
    labels: Int64[Tensor, " m"]
    targets: Int64[Tensor, " m"]
    point: Float[Tensor, "m c h w"]
    adversarial: Bool[Tensor, " m"]
    linearised: Bool[Tensor, " m"]
    weight: Float[Tensor, "m d"]
    offset: Float[Tensor, " m"]


def _search(model: nn.Module, search: _Search, threat: Threat, steps: int, standing: Standing) -> None:
    """Algorithm 1 of the paper, without random restarts.

    A step that follows an adversarial point mostly ends before the boundary, where the next step goes on from the very
    point: there, if the image is large, its gradient is taken at once. A step from elsewhere mostly ends on an adversarial
    point, from which the search goes back first: there no gradient is taken.
    """
    is_large = search.images[0].numel() >= LARGE_IMAGE
    for _ in range(steps):
        if len(unknown := (~search.linearised).nonzero().squeeze(1)):
            _linearise(model, search, unknown)
        search.point = _step(search, threat.norm)
        is_likely_inside = search.adversarial & is_large
        likely_inside, others = is_likely_inside.nonzero().squeeze(1), (~is_likely_inside).nonzero().squeeze(1)
        search.linearised = torch.zeros_like(search.linearised)
        search.adversarial = torch.zeros_like(search.adversarial)
        if len(likely_inside):
            search.adversarial[likely_inside] = _linearise(model, search, likely_inside, unless_adversarial=True)
        if len(others):
            search.adversarial[others] = model(search.point[others]).argmax(dim=1) != search.labels[others]
        delta = search.point - search.images
        near = search.adversarial & (_size(delta.flatten(1), threat.norm) <= float(threat.epsilon))
        here = search.point
        search.point = torch.where(search.adversarial.view(-1, 1, 1, 1), search.images + delta * STEP_BACK, here)
        search.keep(standing.break_with(search.rows, here, near))
        if not len(search.rows):
            return


def _linearise(
    model: nn.Module, search: _Search, rows: Int64[Tensor, " k"], *, unless_adversarial: bool = False
) -> Bool[Tensor, " k"]:
    """Linearise at the points of some rows, or at those that are not adversarial; which are."""
    point = search.point[rows].requires_grad_(True)
    labels, targets = search.labels[rows], search.targets[rows]
    with torch.enable_grad():
        logits = model(point)
        gap = (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)
        total = gap.sum()
    adversarial = logits.detach().argmax(dim=1) != labels
    if unless_adversarial and bool(adversarial.all()):
        return adversarial
    weight = torch.autograd.grad(total, point)[0].flatten(1)
    search.weight[rows] = weight
    search.offset[rows] = (weight * point.detach().flatten(1)).sum(1) - gap.detach()
    search.linearised[rows] = ~adversarial if unless_adversarial else True
    return adversarial


def _step(search: _Search, norm: Norm) -> Float[Tensor, "m c h w"]:
    """Towards the projections of the point and of the unperturbed image onto the hyperplane, the nearer the more."""
    ahead = project_onto_plane(search.point.flatten(1), search.weight, search.offset, norm)
    from_image = project_onto_plane(search.images.flatten(1), search.weight, search.offset, norm)
    here, there = (_size(delta, norm).clamp_min(1e-8) for delta in (ahead, from_image))
    bias = (here / (here + there)).clamp(0.0, MOST_BIASED).view(-1, 1, 1, 1)
    moved = search.point + OVERSHOOT * ahead.view_as(search.point)
    biased = search.images + OVERSHOOT * from_image.view_as(search.point)
    return (moved * (1 - bias) + biased * bias).clamp_(0.0, 1.0)


def project_onto_plane(
    points: Float[Tensor, "m d"], weight: Float[Tensor, "m d"], offset: Float[Tensor, " m"], norm: Norm
) -> Float[Tensor, "m d"]:
    """The smallest change of each point, in the norm, that brings it onto ⟨w, z⟩ = b inside [0,1], or, where no point of
    [0,1] lies there, as near to it as possible.

    Each pixel moves against its share of the excess c = |⟨w, t⟩ − b| until it meets the edge of [0,1]: by min(λ, room) in
    L∞ and by min(λ·|w|, room) in L2 (section 2.2 of the paper).
    """
    excess = (weight * points).sum(1) - offset
    downwards = weight * torch.where(excess >= 0, 1.0, -1.0)[:, None]
    room = torch.where(downwards > 0, points, 1.0 - points)
    size = weight.abs()
    moves = size > (0.0 if norm == "linf" else SMALLEST_WEIGHT)
    if norm == "linf":
        gain, limit = torch.where(moves, size, 0.0), room
        length = torch.minimum(_fill(gain, limit, excess.abs())[:, None], limit)
    else:
        gain, limit = torch.where(moves, size.square(), 0.0), room / torch.where(moves, size, 1.0)
        length = torch.minimum(_fill(gain, limit, excess.abs())[:, None], limit) * size
    return torch.where(moves, -downwards.sign() * length, 0.0)


def _fill(gain: Float[Tensor, "m d"], limit: Float[Tensor, "m d"], amount: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """The level λ at which Σ gain·min(λ, limit) reaches ``amount``; without end where it never does."""
    limits, order = limit.sort(dim=1)
    gains = gain.gather(1, order)
    still_open = gains.flip(1).cumsum(1).flip(1)  # of this pixel and those with more room
    filled = (gains * limits).cumsum(1)
    before = torch.cat([torch.zeros_like(filled[:, :1]), filled[:, :-1]], dim=1)
    reached = before + limits * still_open  # what a level as high as this pixel's limit brings; it rises from pixel to pixel
    pixel = torch.searchsorted(reached, amount[:, None]).clamp_max_(limits.shape[1] - 1)
    level = (amount[:, None] - before.gather(1, pixel)) / still_open.gather(1, pixel).clamp_min(1e-30)
    return torch.where(amount >= filled[:, -1], torch.inf, level.squeeze(1).clamp_min(0.0))


def _size(delta: Float[Tensor, "m d"], norm: Norm) -> Float[Tensor, " m"]:
    return delta.abs().amax(1) if norm == "linf" else delta.square().sum(1).sqrt()
