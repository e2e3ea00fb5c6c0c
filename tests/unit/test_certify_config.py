"""Configurations of certificates: what not even unanimous samples certify is refused before any work."""

from fractions import Fraction

import pytest

from proxyrob.certify import certified_radius, design_looks, lower_bound
from proxyrob.config import load_config
from proxyrob.config.certify import largest_radius


def test_samples_too_few_to_certify_anything_are_refused() -> None:
    """With alpha 0.001 nine agreeing samples certify nothing: an error says so and how many it takes."""
    with pytest.raises(ValueError, match=r"certify\.n is 9: .* certify nothing.*expected at least 10"):
        load_config("digits", ["certify.n=9", "certify.radii=[0.0]"])
    assert load_config("digits", ["certify.n=10", "certify.radii=[0.0]"]).certify.n == 10


def test_radii_beyond_the_largest_certifiable_one_are_refused() -> None:
    """A radius that no image can reach with these n and alpha is refused with the cap; the cap itself is not."""
    cap = largest_radius(0.25, 10_000, 0.001)
    assert load_config("digits", [f"certify.radii=[0, {cap}]"]).certify.radii == (0.0, cap)
    with pytest.raises(ValueError, match=rf"certify\.radii asks for .* no radius above {cap:.3f} can be certified"):
        load_config("digits", [f"certify.radii=[0, {cap + 1e-6}]"])


def test_linf_thresholds_beyond_the_largest_radius_are_refused() -> None:
    """Where the size of images is known L∞ thresholds are refused like the radii they need, else when the images are there."""
    assert load_config("digits", ["certify.linf=[2/255, 0.0999]"]).certify.linf[1].epsilon == Fraction(999, 10_000)
    with pytest.raises(
        ValueError, match=r"certify\.linf asks for 1/10, which on images of 64 values needs an L2 radius of 0\.800"
    ):
        load_config("digits", ["certify.linf=[2/255, 0.1]"])
    colour = ["source.kind=cifar10", "source.num_test=null", "certify.linf=[4/255]"]
    with pytest.raises(ValueError, match=r"on images of 3072 values needs an L2 radius of 0\.869"):
        load_config("digits", colour)
    own = ["source={kind: npz, name: own, train: a.npz, test: b.npz}", "certify.linf=[4/255]"]
    assert load_config("digits", own).certify.require_reachable(0.25, None) is None


@pytest.mark.parametrize("linf", ["[8/255, 2/255]", "[2/255, 2/255]", "[2]", "['l2:2/255']", "2/255", "[0]"])
def test_impossible_linf_thresholds_are_refused(linf: str) -> None:
    """Thresholds ascend, and each is an L∞ threat model in pixel units."""
    with pytest.raises(ValueError, match=r"certify\.linf"):
        load_config("digits", [f"certify.linf={linf}"])


def test_a_sequential_cap_counts_what_the_last_look_is_sure_to_have() -> None:
    """Alpha that earlier looks may spend is not there for the last one; the error says so."""
    changes = ["certify.method.kind=sequential", "certify.method.early_share=0.5"]
    cap = largest_radius(0.25, 10_000, 0.0005)
    assert load_config("digits", [*changes, f"certify.radii=[{cap}]"])
    with pytest.raises(ValueError, match=r"alpha 0\.001 \(50 % of it for the last look\) no radius above"):
        load_config("digits", [*changes, f"certify.radii=[{cap + 1e-6}]"])


@pytest.mark.parametrize("early_share", [0.0, 0.2, 0.5, 0.99])
def test_a_grid_up_to_the_cap_can_be_certified(early_share: float) -> None:
    """Whatever the configuration lets pass has a design, but for rounding: nothing is refused after hours of training."""
    for n, alpha in ((20, 0.01), (100, 0.001), (10_000, 0.001)):
        if (cap := largest_radius(0.25, n, alpha * (1.0 - early_share))) > 0.0:
            design = design_looks(
                (0.9999999 * cap,), sigma=0.25, n=n, alpha=alpha, looks=50, early_share=early_share, futility=0.003
            )
            assert design.certify[0, -1] <= n


def test_the_largest_radius_is_that_of_unanimous_samples() -> None:
    """The cap is what the certificate of n equal votes says, and grows with n and sigma."""
    for sigma, n, alpha in ((0.25, 100, 0.001), (0.5, 10_000, 0.01)):
        radius = certified_radius(lower_bound(n, n, alpha), sigma)
        assert radius is not None
        assert largest_radius(sigma, n, alpha) == pytest.approx(radius, rel=1e-9)
    assert largest_radius(0.25, 5, 0.001) == 0.0
