"""Square (Andriushchenko et al. 2020, «Square Attack: a query-efficient black-box adversarial attack via random search»)."""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from proxyrob.attacks.margin import margins
from proxyrob.attacks.standing import Attacked, Confirm, Standing, believe
from proxyrob.attacks.windowed import WindowedModel
from proxyrob.attacks.windows import Window
from proxyrob.device import eval_mode
from proxyrob.threat import Threat

QUERIES = 5000
FIRST_SHARE = 0.8
"""Share of the pixels that the first squares cover (p)."""

HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries after which the share is halved: the schedule of the paper for 10,000 queries, as AutoAttack runs it."""

WORTHWHILE_OPERATIONS = 3e8
"""What a reading has to save before following windows, which takes some milliseconds by itself, is worth it."""

MOST_BYTES = 2**31
"""Memory that the outputs of layers may take."""

TILES = 5
"""In L2 the first perturbation is a checkerboard of about this many tiles in each direction."""


def attack_square(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    labels: Int64[Tensor, " b"],
    threat: Threat,
    *,
    generator: torch.Generator,
    queries: int = QUERIES,
    confirm: Confirm = believe,
) -> Attacked:
    """Change a random square (in L2: move the perturbation of one into another) wherever that lowers the margin
    z_y − max z_other, without any gradient; ``images`` have to be classified correctly.

    In L∞ on the CPU the model is read again only where the square has changed something, if that saves enough.

    Randomness: the first perturbation, then in every query the place and the signs, from ``generator`` (on the CPU). Raises
    ``ValueError`` for images of less than 5×5 pixels in L2.
    """
    standing = Standing(images, labels, confirm)
    search = (_LinfSearch if threat.norm == "linf" else _L2Search)(threat, generator, images)
    with eval_mode(model), torch.no_grad():
        reader = _Reader(model)
        rows, best = standing.rows, images.clone()
        least = torch.full((len(images),), torch.inf, device=images.device)
        for query in range(queries + 1):
            window, patch = search.begin() if query == 0 else search.propose(query - 1, best)
            found = -margins(reader.read(best, window, patch), labels[rows])
            lower = found < least
            least = torch.where(lower, found, least)
            best[window.place][lower] = patch[lower]
            reader.accept(lower)
            stays = standing.break_with(rows, best, lower & (least <= 0))
            if not bool(stays.all()):
                rows, best, least = rows[stays], best[stays], least[stays]
                search.keep(stays)
                reader.keep(stays)
            if not len(rows):
                break
    return standing.outcome()


class _Reader:
    """Reads a model where a window of its images has changed: whole, or only what depends on it where that saves enough."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._windowed: WindowedModel | None = None
        self._size = (0, 0)

    def read(self, images: Float[Tensor, "m c h w"], window: Window, patch: Float[Tensor, "m c i j"]) -> Float[Tensor, "m k"]:
        if (window.height, window.width) != self._size:
            self._size = (window.height, window.width)
            self._windowed = self._record(images) if images.device.type == "cpu" else None
        if self._windowed is not None:
            return self._windowed.read(patch, window)
        changed = images.clone()
        changed[window.place] = patch
        return self._model(changed)

    def _record(self, images: Float[Tensor, "m c h w"]) -> WindowedModel | None:
        if self._size == images.shape[2:]:
            return None
        for_one = WindowedModel(self._model, images[:1], *self._size)
        saves_enough = for_one.saved_operations * len(images) >= WORTHWHILE_OPERATIONS
        if not saves_enough or for_one.size_bytes * len(images) > MOST_BYTES or not for_one.is_right():
            return None
        return WindowedModel(self._model, images, *self._size)

    def accept(self, rows: Bool[Tensor, " m"]) -> None:
        """The last patch was taken over into these images."""
        if self._windowed is not None:
            self._windowed.accept(rows)

    def keep(self, rows: Bool[Tensor, " m"]) -> None:
        """The other images are out."""
        if self._windowed is not None:
            self._windowed.keep(rows)


class _Draws:
    """Random numbers in the order in which the authors' program draws them: signs and places, from uniform ones."""

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self._generator, self._device = generator, device

    def signs(self, *shape: int) -> Tensor:
        return (2 * torch.rand(shape, generator=self._generator) - 1).sign().to(self._device)

    def place(self, limit: int) -> int:
        """A whole number below ``limit``, or 0."""
        return int(limit * torch.rand(1, generator=self._generator))

    def coin(self) -> bool:
        return bool(torch.rand(1, generator=self._generator) > 0.5)


def _side(query: int, height: int, width: int, smallest: int) -> int:
    """Side of the square of a query, before it is limited to the image."""
    share = FIRST_SHARE / 2 ** sum(query > after for after in HALVED_AFTER)
    return max(round(math.sqrt(share * height * width)), smallest)


class _LinfSearch:
    """Stripes of ±ε to begin with; in each query one square, the same for all images, is set to ±ε per channel."""

    def __init__(self, threat: Threat, generator: torch.Generator, images: Float[Tensor, "b c h w"]) -> None:
        self._epsilon, self._images = float(threat.epsilon), images
        self._draws = _Draws(generator, images.device)

    def begin(self) -> tuple[Window, Float[Tensor, "b c h w"]]:
        b, c, h, w = self._images.shape
        return Window(0, 0, h, w), (self._images + self._epsilon * self._draws.signs(b, c, 1, w)).clamp_(0.0, 1.0)

    def propose(self, query: int, best: Float[Tensor, "m c h w"]) -> tuple[Window, Float[Tensor, "m c i j"]]:
        _, c, h, w = best.shape
        side = min(_side(query, h, w, 1), h, w)
        window = Window(self._draws.place(h - side), self._draws.place(w - side), side, side)
        images = self._images[window.place]
        patch = best[window.place] + 2.0 * self._epsilon * self._draws.signs(c, 1, 1)
        patch = torch.clamp(patch, images - self._epsilon, images + self._epsilon)
        return window, patch.clamp_(0.0, 1.0)

    def keep(self, rows: Bool[Tensor, " m"]) -> None:
        """Forget the other images."""
        self._images = self._images[rows]


class _L2Search:
    """A checkerboard of bumps to begin with; in each query the perturbation of one square goes into a bump in another."""

    def __init__(self, threat: Threat, generator: torch.Generator, images: Float[Tensor, "b c h w"]) -> None:
        self._epsilon, self._images = float(threat.epsilon), images
        self._square = float(torch.tensor(self._epsilon).square())
        self._draws = _Draws(generator, images.device)
        if min(images.shape[2:]) < TILES:
            raise ValueError(f"Square in L2 needs images of at least {TILES}×{TILES} pixels, got {tuple(images.shape[2:])}")

    def begin(self) -> tuple[Window, Float[Tensor, "b c h w"]]:
        b, c, h, w = self._images.shape
        side = h // TILES
        margin = (h - side * TILES) // 2
        delta = torch.zeros_like(self._images)
        for i in range(h // side):
            for j in range(w // side):
                top, left = margin + i * side, margin + j * side
                bump = self._bump(side) * self._draws.signs(b, c, 1, 1)
                tile = delta[:, :, top : top + side, left : left + side]
                tile += bump[:, :, : tile.shape[2], : tile.shape[3]]
        return Window(0, 0, h, w), self._at_epsilon(delta)

    def propose(self, query: int, best: Float[Tensor, "m c h w"]) -> tuple[Window, Float[Tensor, "m c h w"]]:
        m, c, h, w = best.shape
        side = _side(query, h, w, 3)
        side = min(side + (side % 2 == 0), h, w)
        new = Window(self._draws.place(h - side), self._draws.place(w - side), side, side).place
        old = Window(self._draws.place(h - side), self._draws.place(w - side), side, side).place
        delta = best - self._images
        either = torch.zeros_like(delta[:1, :1])
        either[new], either[old] = 1.0, 1.0
        inside = _length(delta * either)
        whole = delta.square().flatten(1).sum(1).sqrt().view(-1, 1, 1, 1)
        bump = self._bump(side) * self._draws.signs(m, c, 1, 1) + delta[new] / (1e-12 + _length(delta[new]))
        unused = (self._square - whole.square()).clamp_min(0.0) / c
        bump = bump / (1e-12 + _length(bump)) * (unused + inside.square()).sqrt()
        delta[old] = 0.0
        delta[new] = bump
        return Window(0, 0, h, w), self._at_epsilon(delta)

    def keep(self, rows: Bool[Tensor, " m"]) -> None:
        """Forget the other images."""
        self._images = self._images[rows]

    def _at_epsilon(self, delta: Float[Tensor, "m c h w"]) -> Float[Tensor, "m c h w"]:
        length = delta.square().flatten(1).sum(1).sqrt().view(-1, 1, 1, 1)
        return (self._images + delta / (length + 1e-12) * self._epsilon).clamp_(0.0, 1.0)

    def _bump(self, side: int) -> Float[Tensor, "1 1 s s"]:
        """Two pyramids of opposite sign, one above the other or side by side, of length 1 together (section 3.4)."""
        bump = torch.cat([_pyramid(side // 2, side), -_pyramid(side - side // 2, side)])
        bump = bump / bump.square().sum(dim=(0, 1), keepdim=True).sqrt()
        return (bump.T if self._draws.coin() else bump).contiguous()[None, None].to(self._images.device)


def _length(delta: Float[Tensor, "m c i j"]) -> Float[Tensor, "m c 1 1"]:
    return delta.square().sum(dim=(2, 3), keepdim=True).sqrt()


def _pyramid(height: int, width: int) -> Float[Tensor, "height width"]:
    """Σ_k 1/(k+1)² over the squares of radius k around the middle that cover a pixel; of length 1."""
    pyramid = torch.zeros(height, width)
    row, column = height // 2, width // 2
    for k in range(max(row, column) + 1):
        pyramid[max(row - k, 0) : row + k + 1, max(column - k, 0) : column + k + 1] += 1.0 / (k + 1) ** 2
    return pyramid / pyramid.square().sum(dim=(0, 1), keepdim=True).sqrt()
