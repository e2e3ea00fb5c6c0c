"""Samples, for any selection of images: image i depends on seed and i alone."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyrob.config import DiffusionProxy, JitterProxy
from proxyrob.proxy import fit_diffusion
from proxyrob.proxy.diffusion import DiffusionSampler
from proxyrob.proxy.jitter import JitterSampler
from proxyrob.proxy.sampling import Sampler
from proxyrob.storage import Stage

NUM_IMAGES = 40
TINY = DiffusionProxy(width=16, num_blocks=1, steps=30, batch_size=32, sampler_steps=4)


@pytest.fixture(scope="module", params=["jitter", "conditional", "unconditional"])
def sampler(request: pytest.FixtureRequest, digits: Stage, tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    """Each proxy, fitted where it needs fitting."""
    if request.param == "jitter":
        return JitterSampler(JitterProxy(), source=digits, seed=0)
    config = TINY.replace(conditional=request.param == "conditional")
    stage = Stage("proxy", "1" * 64, tmp_path_factory.mktemp(request.param), {})
    fit_diffusion(config, source=digits, seed=0, stage=stage)
    return DiffusionSampler(config, source=digits, proxy=stage, seed=0)


@cache
def _all_images(sampler: Sampler) -> np.ndarray:
    """The first images, drawn in one batch."""
    return sampler.sample(np.arange(NUM_IMAGES))


@given(ids=st.lists(st.integers(0, NUM_IMAGES - 1), min_size=1, max_size=12))
def test_an_image_does_not_depend_on_its_batch(sampler: Sampler, ids: list[int]) -> None:
    """Alone, repeated, in any order and any company, image i has the same bytes."""
    assert np.array_equal(sampler.sample(np.array(ids)), _all_images(sampler)[ids])


def test_images_differ(sampler: Sampler) -> None:
    """No two of the images are equal, so that the property above says something."""
    assert len({image.tobytes() for image in _all_images(sampler)}) == NUM_IMAGES
