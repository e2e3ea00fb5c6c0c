"""Ours against the code of Cohen et al. 2019, read from a checkout in ``$PROXYROB_PEERS/smoothing`` where there is one.

It has no licence, so nothing of it is copied. It was written for a SciPy that had ``binom_test`` and imports seaborn; both
are stood in for, and neither has a part in what is compared.
"""

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from scipy import stats

from proxyrob.certify import certify_image, read_certificates, to_smoothing_tsv
from proxyrob.certify.certificates import certified_rows
from proxyrob.storage import Stage
from tests.toys import Scripted

CODE = Path(os.environ.get("PROXYROB_PEERS", "/nonexistent")) / "smoothing" / "code"

pytestmark = pytest.mark.skipif(not CODE.is_dir(), reason="no checkout $PROXYROB_PEERS/smoothing")


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Their modules, by name."""
    seaborn = ModuleType("seaborn")
    monkeypatch.setattr(seaborn, "set", lambda: None, raising=False)
    monkeypatch.setitem(sys.modules, "seaborn", seaborn)
    monkeypatch.setattr(stats, "binom_test", None, raising=False)
    monkeypatch.setattr(mpl, "use", lambda _backend: None)

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"smoothing_{name}", CODE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # of escapes in their texts
            warnings.simplefilter("ignore", DeprecationWarning)  # which is what Python 3.11 calls them
            spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("count", [0, 100, 249, 250, 251, 277, 278, 279, 285, 300, 400, 499, 500])
@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_a_certificate_is_theirs_for_the_same_votes(count: int, alpha: float, peer: Any) -> None:
    """The same class, radius or abstention; but for abstaining at a bound of exactly one half, which whole votes do not hit."""
    sigma, n0, n = 0.25, 20, 500
    votes = [np.array([5, 15]), np.array([n - count, count])]
    answers = [0] * 5 + [1] * 15 + [0] * (n - count) + [1] * count
    ours = certify_image(
        Scripted(answers, num_classes=2),
        torch.zeros(1, 2, 2),
        sigma=sigma,
        n0=n0,
        n=n,
        alpha=alpha,
        batch_size=100,
        select=torch.Generator(),
        estimate=torch.Generator(),
    )
    smooth = peer("core").Smooth(torch.nn.Identity(), 2, sigma)
    smooth._sample_noise = lambda *_: votes.pop(0)
    predicted, radius = smooth.certify(None, n0, n, alpha, 100)
    assert ours["prediction"] == (None if predicted == -1 else predicted)
    assert ours["radius_l2"] == pytest.approx(radius, abs=1e-12)


def test_their_analysis_reads_our_table(certified: Stage, tmp_path: Path, peer: Any) -> None:
    """Certified accuracy at every radius, counted by their tool from our export, is ours."""
    table, _ = read_certificates(certified)
    path = tmp_path / "certificates.tsv"
    path.write_text(to_smoothing_tsv(table))
    radii = np.linspace(0.0, 0.4, 41)
    theirs = peer("analyze").ApproximateAccuracy(str(path)).at_radii(radii)
    assert theirs.tolist() == [certified_rows(table, radius).mean() for radius in radii.tolist()]
    assert 0.0 < theirs.min() < theirs.max() < 1.0
