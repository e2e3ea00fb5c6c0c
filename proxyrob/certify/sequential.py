"""Certificates that stop sampling as soon as the answer is known: which radii of a grid are certified."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy import stats
from torch import Tensor, nn

from proxyrob.certify.votes import count_votes_of_several

FIRST_LOOK = 32
NEGLIGIBLE = 1e-12
"""Share of alpha below which a tail of a distribution is not followed; it is counted as if it had led to a certificate."""
ROUNDING = 1e-9
"""Share of alpha kept back for the rounding errors of sums of float64."""


@dataclass(frozen=True)
class SequentialDesign:
    """When to stop, and what to conclude, by the number of votes for the chosen class.

    After ``looks[k]`` samples, ``radii[i]`` is certified where at least ``certify[i, k]`` votes are for the class, and is no
    longer pursued where at most ``give_up[i, k]`` are. Both ascend with the radius. ``alpha`` bounds the probability that
    any radius is certified within which the class can change.
    """

    radii: tuple[float, ...]
    alpha: float
    looks: Int64[np.ndarray, " k"]
    certify: Int64[np.ndarray, "r k"]
    give_up: Int64[np.ndarray, "r k"]

    def conclude(
        self, look: int, successes: Int64[np.ndarray, " b"], certified: Int64[np.ndarray, " b"]
    ) -> tuple[Int64[np.ndarray, " b"], Bool[np.ndarray, " b"]]:
        """How many of the radii are certified after a look, and whether all is known.

        ``successes`` are the votes by then, ``certified`` the radii certified by earlier looks: what was certified once
        stays so. All is known when every radius is certified or the next one is no longer pursued, hence none beyond it.
        """
        reached = (successes[:, None] >= self.certify[:, look]).sum(axis=1)
        certified = np.maximum(certified, reached)
        following = np.minimum(certified, len(self.radii) - 1)
        return certified, (certified == len(self.radii)) | (successes <= self.give_up[following, look])


def design_looks(
    radii: tuple[float, ...], *, sigma: float, n: int, alpha: float, looks: int, early_share: float, futility: float
) -> SequentialDesign:
    """Thresholds for at most ``looks`` looks at up to ``n`` samples, evenly spaced on a logarithmic scale.

    Radius r holds where the class has more than p0 = Φ(r/σ) of the probability (Cohen et al. 2019, theorem 1). With p0 the
    votes are a random walk whose distribution after each look, given that no threshold was reached before, is computed
    exactly; each look takes the smallest threshold that keeps the probability of having reached any so far within what may
    be spent by then: ``early_share`` · alpha in equal parts over the looks before the last, and all of alpha by the last
    (alpha spending, Lan and DeMets 1983, with binomial distributions in place of normal ones). A smaller p makes every
    threshold less likely to be reached, so alpha bounds the probability of a false certificate for every p ≤ p0. What is
    spent is a union over looks that overlap, which is why it certifies more, from fewer samples, than a union bound of
    Clopper–Pearson intervals; and a betting mixture, valid after every single sample, pays for looks that nobody takes.

    *Several radii, one alpha.* The radii are nested: thresholds ascend with the radius (enforced by a running maximum,
    which only raises them). A certificate is false when it reaches beyond the true radius; then the walk has reached the
    threshold of the smallest radius of the grid that does not hold, too. That one event has probability alpha at most, and
    contains every false certificate of the image. So alpha holds for the whole curve of an image and is not divided.

    *Stopping early costs nothing.* The bound counts every threshold that a walk of ``n`` samples reaches, and a walk that is
    stopped reaches fewer. A radius is given up where too few votes are for the class: where no later threshold can be
    reached any more, or where, with p0, so few have a probability of ``futility`` at most. A radius counts as certified as
    soon as a later threshold will be reached whatever the remaining votes. With ``early_share`` and ``futility`` 0 nothing
    else stops, and the verdict is that of ``n`` samples for every image.

    Everything is in float64, with a share of alpha kept back for rounding. Raises ``ValueError`` for radii that do not
    ascend or that not even ``n`` unanimous votes would certify.
    """
    if list(radii) != sorted(set(radii)) or not radii or radii[0] < 0.0:
        raise ValueError(f"expected ascending radii of at least 0, got {radii}")
    spaced = np.rint(np.geomspace(min(FIRST_LOOK, n), n, looks)).astype(np.int64)
    spaced[-1] = n
    at = np.unique(spaced)
    spent_by = early_share * alpha * np.arange(1, len(at) + 1) / max(1, len(at) - 1)
    spent_by[-1] = alpha
    certify, give_up = (np.empty((len(radii), len(at)), np.int64) for _ in range(2))
    for i, radius in enumerate(radii):
        p0 = float(stats.norm.cdf(radius / sigma))
        certify[i] = _spend(at, p0, spent_by, NEGLIGIBLE * alpha)
        if certify[i, -1] > n:
            raise ValueError(
                f"radius {radius:g} is certified by none of {n} samples with sigma {sigma:g} and alpha {alpha:g}, even if all "
                "agree; ask for smaller radii or raise n or sigma"
            )
        give_up[i] = np.asarray(stats.binom.ppf(futility, at, p0), np.int64) - 1
    certify = np.maximum.accumulate(certify, axis=0)
    certify = np.minimum.accumulate(certify[:, ::-1], axis=1)[:, ::-1]  # what a later look is sure to certify
    failures = np.maximum.accumulate((at - certify)[:, ::-1], axis=1)[:, ::-1]  # that some later look still allows
    give_up = np.maximum.accumulate(np.maximum(give_up, at - failures - 1), axis=0)
    return SequentialDesign(radii=radii, alpha=alpha, looks=at, certify=certify, give_up=give_up)


def certify_sequentially(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    design: SequentialDesign,
    *,
    sigma: float,
    n0: int,
    batch_size: int,
    select: list[torch.Generator],
    estimate: list[torch.Generator],
) -> list[dict[str, object]]:
    """Certify several images on the radii of a design, each with as many samples as its answer takes.

    As in CERTIFY the class comes from ``n0`` samples and is judged on others. Returns for each image ``prediction``
    (``None`` where not even the smallest radius is certified), ``count`` of the chosen class among ``n``, the samples it
    took; ``n0``, ``alpha``, ``sigma``; ``radius_l2``, the largest radius of the grid that is certified (0 where none is); and
    ``looks``, how many it took.

    Randomness: as ``certify_image``, from the two streams of each image; an image's noise depends on no other image.
    """
    chosen = count_votes_of_several(model, images, sigma, n0, batch_size, select).argmax(1)
    successes, certified, samples, taken = (np.zeros(len(images), np.int64) for _ in range(4))
    running, seen = np.arange(len(images)), 0
    for look, total in enumerate(design.looks.tolist()):
        still = torch.from_numpy(running).to(images.device)
        streams = [estimate[index] for index in running]
        votes = count_votes_of_several(model, images[still], sigma, total - seen, batch_size, streams)
        successes[running] += votes.gather(1, chosen[still, None]).squeeze(1).cpu().numpy()
        samples[running], taken[running], seen = total, look + 1, total
        certified[running], known = design.conclude(look, successes[running], certified[running])
        running = running[~known]
        if not len(running):
            break
    return [
        {
            "prediction": int(label) if reached else None,
            "count": int(count),
            "n0": n0,
            "n": int(n),
            "alpha": design.alpha,
            "sigma": sigma,
            "radius_l2": design.radii[reached - 1] if reached else 0.0,
            "looks": int(looks),
        }
        for label, count, n, reached, looks in zip(chosen.tolist(), successes, samples, certified, taken, strict=True)
    ]


def _spend(
    looks: Int64[np.ndarray, " k"], p0: float, spent_by: Float64[np.ndarray, " k"], negligible: float
) -> Int64[np.ndarray, " k"]:
    """The smallest thresholds whose probability of being reached by look k, with ``p0``, is at most ``spent_by[k]``.

    Where nothing may be spent the threshold is one that cannot be reached, looks[k] + 1.
    """
    thresholds = looks + 1
    walk, lowest = np.ones(1), 0  # probability of lowest, lowest + 1, … votes with no threshold reached
    spent = 0.0
    seen = 0
    for k, look in enumerate(looks.tolist()):
        least, most = int(stats.binom.ppf(negligible, look - seen, p0)), int(stats.binom.isf(negligible, look - seen, p0))
        step = stats.binom.pmf(np.arange(least, most + 1), look - seen, p0)
        walk, lowest, seen = np.convolve(walk, step), lowest + least, look
        dropped = int(np.searchsorted(np.cumsum(walk), negligible))
        walk, lowest = walk[dropped:], lowest + dropped
        spent += 3.0 * negligible  # both ends of the step and the lower end of the walk
        reached = np.append(np.cumsum(walk[::-1])[::-1], 0.0)
        affordable = np.flatnonzero(spent + reached <= (1.0 - ROUNDING) * spent_by[k])
        if len(affordable):
            thresholds[k] = lowest + affordable[0]
            spent += reached[affordable[0]]
            walk = walk[: affordable[0]]
    return thresholds
