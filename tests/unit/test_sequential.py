"""Sequential certification: what it guarantees, computed exactly, and what it saves."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from proxyrob.certify import (
    SequentialDesign,
    certified_radius,
    certify_image,
    certify_sequentially,
    design_looks,
    lower_bound,
)
from tests.toys import Linear, random_images, random_linear

SIGMA = 0.25
GRID = (0.0, 0.25, 0.5, 0.65)


def _design(radii: tuple[float, ...] = GRID, **values: Any) -> SequentialDesign:
    given: dict[str, Any] = {"n": 2000, "alpha": 0.01, "looks": 40, "early_share": 0.2, "futility": 0.003, **values}
    return design_looks(radii, sigma=SIGMA, **given)


def _probability(radius: float) -> float:
    """What a class must have of the probability to be certified up to a radius: Φ(r/σ)."""
    return float(stats.norm.cdf(radius / SIGMA))


def _walk(design: SequentialDesign, p: float) -> tuple[np.ndarray, float]:
    """With which probability 0, 1, … radii are certified, and the mean number of samples, when each vote is right with p.

    Exact, and independent of how the thresholds were found: the walk goes vote by vote over all states (radii certified,
    right votes), and stops where ``conclude`` says so.
    """
    radii, most = len(design.radii), int(design.looks[-1])
    running, ended = np.zeros((radii + 1, most + 1)), np.zeros(radii + 1)
    running[0, 0] = 1.0
    samples = 0.0
    state, right = (grid.ravel() for grid in np.indices(running.shape))
    for look, (seen, total) in enumerate(pairwise([0, *design.looks.tolist()])):
        samples += (total - seen) * running.sum()
        for _ in range(total - seen):
            running[:, 1:] = (1.0 - p) * running[:, 1:] + p * running[:, :-1]
            running[:, 0] *= 1.0 - p
        certified, known = design.conclude(look, right, state)
        weight = running.ravel()
        ended += np.bincount(certified[known], weight[known], minlength=radii + 1)
        left = np.bincount(certified[~known] * (most + 1) + right[~known], weight[~known], minlength=running.size)
        running = left.astype(np.float64).reshape(radii + 1, most + 1)  # whole numbers where nothing is left
    assert running.sum() == 0.0, "all is known after the last look"
    assert ended.sum() == pytest.approx(1.0, abs=1e-9)
    return ended, samples


# The guarantee


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("early_share", [0.0, 0.2, 0.9])
@pytest.mark.parametrize(("n", "radius"), [(40, 0.0), (300, 0.0), (300, 0.25), (1500, 0.5), (800, 0.25)])
def test_a_false_certificate_has_probability_alpha_at_most(n: int, radius: float, early_share: float, alpha: float) -> None:
    """Exactly, at the largest probability at which the radius does not hold, and just below; and alpha is made use of."""
    design = _design((radius,), n=n, alpha=alpha, early_share=early_share)
    p0 = _probability(radius)
    at, below = (_walk(design, p)[0][1] for p in (p0, p0 * (1.0 - 1e-6)))
    assert below < at <= alpha
    assert at > 0.5 * alpha or n == 40, "as much as whole numbers of votes allow"


@pytest.mark.parametrize("true_radius", GRID)
def test_alpha_holds_for_all_radii_of_an_image_together(true_radius: float) -> None:
    """With four radii that share the samples, any certificate beyond the true radius has probability alpha at most."""
    design = _design(alpha=0.01)
    ended, _ = _walk(design, _probability(true_radius))
    beyond = GRID.index(true_radius)
    assert 0.002 < ended[beyond + 1 :].sum() <= 0.01
    assert ended[: beyond + 1].sum() >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("early_share", [0.0, 0.2])
@pytest.mark.parametrize("true_radius", GRID)
def test_the_guarantee_holds_for_ten_thousand_samples(true_radius: float, early_share: float) -> None:
    """The same at the size that is used: n = 10,000 and alpha = 0.001, radii up to near the cap."""
    design = _design(n=10_000, alpha=0.001, looks=50, early_share=early_share)
    ended, _ = _walk(design, _probability(true_radius))
    assert 0.0005 < ended[GRID.index(true_radius) + 1 :].sum() <= 0.001


def _simulated_error(design: SequentialDesign, p: float, beyond: int, trials: int, generator: np.random.Generator) -> float:
    """The share of trials in which more than ``beyond`` radii are certified."""
    successes, certified = np.zeros((2, trials), np.int64)
    final, running = np.zeros(trials, np.int64), np.arange(trials)
    for look, (seen, total) in enumerate(pairwise([0, *design.looks.tolist()])):
        successes += generator.binomial(total - seen, p, len(running))
        certified, known = design.conclude(look, successes, certified)
        final[running[known]] = certified[known]
        running, successes, certified = running[~known], successes[~known], certified[~known]
    assert len(running) == 0
    return float((final > beyond).mean())


def _assert_simulated_errors(trials: int, **values: Any) -> None:
    design = _design(**values)
    generator = np.random.default_rng(0)
    for beyond, radius in enumerate(GRID):
        for step in (0.0, 1e-3, 1e-2):  # from the worst probability downwards
            found = _simulated_error(design, _probability(radius) * (1.0 - step), beyond, trials, generator)
            assert found <= design.alpha + 4.0 * np.sqrt(design.alpha / trials), (radius, step)


def test_simulated_certificates_are_false_within_alpha() -> None:
    """Drawn votes agree with the exact computation, at the probabilities that are worst for each radius and below."""
    _assert_simulated_errors(20_000)


@pytest.mark.slow
@pytest.mark.parametrize("early_share", [0.0, 0.2, 0.9])
def test_simulated_certificates_are_false_within_alpha_at_full_size(early_share: float) -> None:
    """100,000 trials for each probability, n = 10,000, alpha = 0.001."""
    _assert_simulated_errors(100_000, n=10_000, alpha=0.001, early_share=early_share)


# What is lost and what is saved


@pytest.mark.parametrize("radius", [0.0, 0.25, 0.5])
def test_little_is_lost_and_most_samples_are_saved(radius: float) -> None:
    """Over images of every probability, 0.2 % fewer at most are certified, with less than half of the samples."""
    n, alpha = 1000, 0.001
    design = _design((radius,), n=n, alpha=alpha)
    least = next(k for k in range(n + 1) if lower_bound(k, n, alpha) > _probability(radius))
    lost, samples = [], []
    for p in np.linspace(0.5, 0.999, 20):
        ended, mean = _walk(design, float(p))
        lost.append(stats.binom.sf(least - 1, n, p) - ended[1])
        samples.append(mean)
    assert np.mean(lost) < 0.002
    assert np.mean(samples) < n / 2


def test_clear_images_take_few_samples() -> None:
    """At 10,000 samples and alpha 0.001, p = 0.99 is known to reach radius 0.25 after 100 samples, p = 0.7 never to."""
    design = _design((0.25,), n=10_000, alpha=0.001, looks=50)
    generator = np.random.default_rng(0)
    for p, most in ((0.99, 100), (0.7, 130), (0.5, 60)):
        votes = np.cumsum(generator.random((200, 10_000)) < p, axis=1)[:, design.looks - 1]
        stopped = ((votes >= design.certify[0]) | (votes <= design.give_up[0])).argmax(axis=1)
        assert design.looks[stopped].mean() < most


@pytest.mark.parametrize("n", [1, 10, 33, 500, 10_000])
@pytest.mark.parametrize("radius", [0.0, 0.1, 0.25, 0.5])
def test_without_early_alpha_the_last_threshold_is_clopper_and_pearsons(n: int, radius: float) -> None:
    """The least votes that certify a radius are those whose one-sided bound reaches it."""
    alpha = 0.01
    if lower_bound(n, n, alpha) <= _probability(radius):
        with pytest.raises(ValueError, match=f"radius {radius:g} is certified by none of {n} samples"):
            _design((radius,), n=n, alpha=alpha, early_share=0.0)
        return
    design = _design((radius,), n=n, alpha=alpha, early_share=0.0, futility=0.0)
    least = int(design.certify[0, -1])
    reached, missed = (certified_radius(lower_bound(k, n, alpha), SIGMA) for k in (least, least - 1))
    assert reached is not None
    assert reached >= radius
    assert missed is None or missed < radius


# Thresholds


@pytest.mark.parametrize("early_share", [0.0, 0.2])
@pytest.mark.parametrize("futility", [0.0, 0.003, 0.4])
def test_thresholds_ascend(early_share: float, futility: float) -> None:
    """With the radius, so that a certificate implies those below; with the samples; and giving up lies below certifying."""
    design = _design(early_share=early_share, futility=futility)
    assert (np.diff(design.looks) > 0).all()
    assert design.looks[-1] == 2000
    for thresholds in (design.certify, design.give_up):
        assert (np.diff(thresholds, axis=0) >= 0).all()
        assert (np.diff(thresholds, axis=1) >= 0).all()
    assert (design.give_up < design.certify).all()
    assert (design.give_up[:, -1] == design.certify[:, -1] - 1).all(), "the last look leaves nothing open"


def test_what_is_lost_or_won_for_sure_ends_the_samples() -> None:
    """With nothing else to stop by: failures that the last look does not allow, or votes that suffice for it."""
    design = _design((0.25,), n=500, early_share=0.0, futility=0.0)
    least = int(design.certify[0, -1])
    assert (design.certify[0] == np.minimum(least, design.looks + 1)).all()
    assert (np.maximum(design.give_up[0], -1) == np.maximum(design.looks - (500 - least) - 1, -1)).all()


@pytest.mark.parametrize("radii", [(), (0.25, 0.0), (0.25, 0.25), (-0.1, 0.0)])
def test_radii_that_do_not_ascend_are_refused(radii: tuple[float, ...]) -> None:
    """A grid is ascending and not empty."""
    with pytest.raises(ValueError, match="expected ascending radii of at least 0"):
        _design(radii)


# On images


def _streams(count: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + k) for k in range(count)]


def _certify(model: Any, images: torch.Tensor, design: SequentialDesign, **values: Any) -> list[dict[str, Any]]:
    count = len(images)
    given: dict[str, Any] = {"sigma": SIGMA, "n0": 20, "batch_size": 64, **values}
    return certify_sequentially(model, images, design, select=_streams(count, 1), estimate=_streams(count, 2), **given)


def test_the_verdict_is_that_of_all_samples_where_only_certainty_stops() -> None:
    """On the same noise the radius is the largest of the grid within the fixed one, image for image, with fewer samples."""
    grid = (0.0, 0.05, 0.1, 0.2, 0.3)
    design = _design(grid, n=300, early_share=0.0, futility=0.0)
    images, model = random_images(30), random_linear(classes=3)
    rows = _certify(model, images, design)
    for image, row, select, estimate in zip(images, rows, _streams(30, 1), _streams(30, 2), strict=True):
        full: dict[str, Any] = certify_image(
            model, image, sigma=SIGMA, n0=20, n=300, alpha=0.01, batch_size=64, select=select, estimate=estimate
        )
        assert row["prediction"] == full["prediction"]
        assert row["radius_l2"] == max((radius for radius in grid if radius <= full["radius_l2"]), default=0.0)
        assert row["n"] <= 300
    assert len({row["radius_l2"] for row in rows}) > 2, "images of all kinds"
    assert any(row["prediction"] is None for row in rows)
    assert np.mean([row["n"] for row in rows]) < 300


def test_a_row_says_what_was_seen() -> None:
    """Votes, samples and looks are those at which the image was stopped; the class is that of the first sample."""
    design = _design((0.0, 0.1, 0.3), n=400)
    rows = _certify(random_linear(classes=3), random_images(20), design)
    for row in rows:
        look = row["looks"] - 1
        assert row["n"] == design.looks[look]
        certified, known = design.conclude(look, np.array([row["count"]]), np.array([0]))
        assert known[0]
        assert row["radius_l2"] == (0.0, *design.radii)[certified[0]]
        assert (row["prediction"] is None) == (certified[0] == 0)
        assert (row["n0"], row["alpha"], row["sigma"]) == (20, 0.01, SIGMA)
    assert len({row["looks"] for row in rows}) > 3


def test_an_image_gets_its_answer_whichever_are_beside_it() -> None:
    """One at a time or all together: the same rows, whatever the size of a batch."""
    images, design = random_images(8), _design((0.0, 0.1, 0.3), n=400)
    together = _certify(random_linear(classes=3), images, design, batch_size=1000)
    for index, (select, estimate) in enumerate(zip(_streams(8, 1), _streams(8, 2), strict=True)):
        streams = {"select": [select], "estimate": [estimate]}
        (alone,) = certify_sequentially(
            random_linear(classes=3), images[index : index + 1], design, sigma=SIGMA, n0=20, batch_size=7, **streams
        )
        assert alone == together[index]


def test_certain_images_are_done_at_once() -> None:
    """Unanimous votes certify every radius that they can at the first look at which they can."""
    model = Linear(torch.zeros(4, 64), torch.tensor([0.0, 1.0, 0.0, 0.0]))
    design = _design((0.0, 0.1), n=10_000, alpha=0.001)
    (row,) = _certify(model, random_images(1), design)
    first = next(k for k, look in enumerate(design.looks) if look >= design.certify[-1, k])
    assert (row["prediction"], row["radius_l2"], row["n"]) == (1, 0.1, design.looks[first])
    assert row["n"] < 60
