"""Results as they were when they were last looked at; ``tests.golden.regenerate`` writes them anew."""

import json
from pathlib import Path

import pytest

from tests.golden.regenerate import CERTIFICATES, PROXIES, TRACES, certify_some, fit_proxies, trace_trainings


def test_losses_are_what_they_were(tmp_path: Path) -> None:
    """Each of 20 losses of each training (both norms, smoothing, batch normalisation) is the stored one, but for rounding."""
    stored, found = json.loads(TRACES.read_text()), trace_trainings(tmp_path)
    assert {name: len(trace) for name, trace in found.items()} == dict.fromkeys(stored, 20)
    for name, trace in found.items():
        assert trace == pytest.approx(stored[name], rel=1e-4), name


def test_losses_of_the_proxy_are_what_they_were(tmp_path: Path) -> None:
    """The diffusion model's loss after 20 steps is the stored one, with classes and without, but for rounding."""
    assert fit_proxies(tmp_path) == pytest.approx(json.loads(PROXIES.read_text()), rel=1e-4)


def test_certificates_are_what_they_were(tmp_path: Path) -> None:
    """Labels, predictions and counts are the stored ones exactly, radii but for the last digits."""
    stored, found = json.loads(CERTIFICATES.read_text()), certify_some(tmp_path)
    assert len(found) == len(stored) == 10
    for row, expected in zip(found, stored, strict=True):
        assert row.pop("radius_l2") == pytest.approx(expected.pop("radius_l2"), abs=1e-9)
        assert row == expected
    assert 0 < sum(row["prediction"] is None for row in found) < 10, "some images are abstained from, some certified"
