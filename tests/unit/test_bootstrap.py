"""The paired bootstrap over images."""

import numpy as np
import pytest
from scipy import stats

from proxyrob.compare import bootstrap_difference, compare_paired


@pytest.mark.parametrize(("candidate_only", "reference_only", "n"), [(30, 12, 200), (3, 40, 500), (1, 0, 60)])
def test_counting_resamples_is_resampling_images(candidate_only: int, reference_only: int, n: int) -> None:
    """The interval is that of scipy's paired bootstrap, which draws images, but for the chance of 10,000 resamples."""
    kinds = [candidate_only, reference_only, n - candidate_only - reference_only]
    differences = np.repeat([1.0, -1.0, 0.0], kinds)
    peer = stats.bootstrap(
        (differences,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    found = bootstrap_difference(candidate_only, reference_only, n)
    assert (found.low, found.high) == pytest.approx((peer.low, peer.high), abs=1.5 / n)


def test_the_seed_names_the_resamples() -> None:
    """The same seed gives the same interval bit for bit; another one nearly the same, and says that it is another."""
    first, again, other = (bootstrap_difference(900, 400, 20_000, seed=seed, resamples=500) for seed in (3, 3, 4))
    assert first == again
    assert (first.seed, first.resamples) == (3, 500)
    assert (first.low, first.high) != (other.low, other.high)
    assert (first.low, first.high) == pytest.approx((other.low, other.high), abs=2e-3)


def test_a_higher_confidence_gives_a_wider_interval() -> None:
    """The confidence is used."""
    narrow, wide = (bootstrap_difference(30, 12, 200, confidence=confidence) for confidence in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_what_never_happened_is_not_seen() -> None:
    """Two models that agree on every image have an interval without width; the Wald interval beside it has one."""
    right = np.arange(50) < 30
    found = compare_paired(right, right)
    assert (found.bootstrap.low, found.bootstrap.high) == (0.0, 0.0)
    assert found.low < 0.0 < found.high


def test_the_interval_covers_the_difference_as_often_as_it_says() -> None:
    """Of 400 samples of 300 images in which the candidate is 8 points better, about 95 % have it inside."""
    generator = np.random.default_rng(0)
    counts = generator.multinomial(300, [0.15, 0.07, 0.78], size=400)
    intervals = [bootstrap_difference(int(up), int(down), 300, resamples=2000) for up, down, _ in counts]
    covered = np.mean([found.low <= 0.08 <= found.high for found in intervals])
    assert 0.92 <= covered <= 0.98


def test_a_comparison_keeps_its_bootstrap() -> None:
    """The interval beside the paired test is of the same counts, with the confidence and seed that were asked for."""
    candidate, reference = np.arange(100) < 60, np.arange(100) < 48
    found = compare_paired(candidate, reference, confidence=0.9, seed=5)
    assert found.bootstrap == bootstrap_difference(12, 0, 100, confidence=0.9, seed=5)
