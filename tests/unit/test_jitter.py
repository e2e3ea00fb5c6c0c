"""The control: training images plus Gaussian noise."""

import numpy as np
import pytest

from proxyrob.config import JitterProxy
from proxyrob.proxy.jitter import JitterSampler
from proxyrob.source import read_split
from proxyrob.storage import Stage


def test_image_i_is_training_image_i_mod_n_plus_noise(digits: Stage) -> None:
    """With hardly any noise the images are the training images, in turn and around again."""
    sampler = JitterSampler(JitterProxy(sigma=1e-6), source=digits, seed=0)
    stored = read_split(digits, "train").stored
    assert np.array_equal(sampler.sample(np.array([0, 59, 60, 121])), stored[[0, 59, 0, 1]])


def test_the_noise_has_the_configured_deviation(digits: Stage) -> None:
    """Sigma is in pixel units of [0,1]; pixels in the middle of the range, which are not clipped, show it."""
    images = JitterSampler(JitterProxy(sigma=0.1), source=digits, seed=0).sample(np.arange(1200))
    original = read_split(digits, "train").stored[np.arange(1200) % 60]
    middle = np.abs(original.astype(float) - 127.5) < 40
    assert np.std((images.astype(float) - original)[middle] / 255) == pytest.approx(0.1, rel=0.05)
    assert np.mean((images.astype(float) - original)[middle] / 255) == pytest.approx(0.0, abs=0.01)


def test_noise_beyond_the_range_is_clipped(digits: Stage) -> None:
    """Strong noise gives black and white, and never wraps around."""
    images = JitterSampler(JitterProxy(sigma=1.0), source=digits, seed=0).sample(np.arange(60))
    original = read_split(digits, "train").stored
    black = original == 0
    assert (images[black] == 0).mean() == pytest.approx(0.5, abs=0.05), "half of the noise on black is below it"


def test_seed_and_id_decide_the_noise(digits: Stage) -> None:
    """The same training image gets other noise under another id or seed, and the same under the same."""
    sampler = JitterSampler(JitterProxy(), source=digits, seed=0)
    first, second = sampler.sample(np.array([5, 65]))
    assert not np.array_equal(first, second)
    assert np.array_equal(sampler.sample(np.array([5]))[0], first)
    assert not np.array_equal(JitterSampler(JitterProxy(), source=digits, seed=1).sample(np.array([5]))[0], first)
