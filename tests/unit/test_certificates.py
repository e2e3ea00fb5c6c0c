"""Tables of certificates: what is counted in them, and how they are handed on."""

import numpy as np
import pandas as pd
import pytest

from proxyrob.certify import CertificationReport, to_smoothing_tsv
from proxyrob.certify.certificates import summarise
from proxyrob.threat import parse_threat
from tests.toys import SMALL_CERTIFY as CONFIG


def _table(*rows: tuple[int, int | None, float]) -> pd.DataFrame:
    """Rows of (label, prediction, radius)."""
    labels, predictions, radii = zip(*rows, strict=True)
    return pd.DataFrame(
        {
            "index": np.arange(len(rows)),
            "label": labels,
            "prediction": pd.array(predictions, dtype="Int64"),
            "radius_l2": radii,
            "n0": 20,
            "n": 100 * np.arange(1, len(rows) + 1),
            "elapsed_s": [0.125] * len(rows),
        }
    )


TABLE = _table((0, 0, 0.1), (1, 1, 0.5), (2, 9, 0.7), (3, None, 0.0))


def _summary(radii: tuple[float, ...]) -> CertificationReport:
    return summarise(TABLE, CONFIG.replace(radii=radii), 64)


def test_only_a_right_class_counts_and_only_up_to_its_radius() -> None:
    """A wrong class or an abstention is not certified at any radius; a radius that is just reached counts."""
    report = _summary((0.0, 0.1, 0.25, 0.5, 0.75))
    assert {radius: share.value for radius, share in report.certified.items()} == {
        "0": 0.5,
        "0.1": 0.5,
        "0.25": 0.25,
        "0.5": 0.25,
        "0.75": 0.0,
    }
    assert (report.certified["0"].n, report.abstained.value) == (4, 0.25)


def test_the_average_radius_counts_wrong_and_abstained_as_zero() -> None:
    """(0.1 + 0.5 + 0 + 0) / 4."""
    report = _summary((0.0,))
    assert report.average_certified_radius.value == pytest.approx(0.15)
    assert report.average_certified_radius.n == 4


def test_the_expected_number_of_false_certificates_is_reported() -> None:
    """Each certificate may be false with probability alpha."""
    assert _summary((0.0,)).expected_false_certificates == pytest.approx(0.04)


def test_an_linf_threshold_is_certified_by_the_radius_that_contains_it() -> None:
    """On 25 values 1/10 takes an L2 radius of 0.5, which one certificate has; on 26 values it takes more."""
    linf = parse_threat("linf:1/10")
    for num_values, share in ((25, 0.25), (26, 0.0)):
        report = summarise(TABLE, CONFIG.replace(linf=(linf,)), num_values)
        assert {name: found.value for name, found in report.certified_linf.items()} == {"1/10": share}


def test_the_samples_of_an_image_are_all_that_were_drawn() -> None:
    """The mean counts the samples that chose the class, too."""
    assert _summary((0.0,)).samples_per_image == pytest.approx((4 * 20 + 100 + 200 + 300 + 400) / 4)


def test_the_tsv_is_that_of_the_smoothing_tools() -> None:
    """Six columns; abstention is -1 and not correct; a wrong class keeps its radius."""
    assert to_smoothing_tsv(TABLE) == (
        "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
        "0\t0\t0\t0.1\t1\t0:00:00.125000\n"
        "1\t1\t1\t0.5\t1\t0:00:00.125000\n"
        "2\t2\t9\t0.7\t0\t0:00:00.125000\n"
        "3\t3\t-1\t0.0\t0\t0:00:00.125000\n"
    )


@pytest.mark.parametrize("radius", [0.4999, 0.49999999999999994, 0.1 + 0.2, 1e-7, 1 / 3, 0.4347107026403933])
def test_the_tsv_loses_no_digit_of_a_radius(radius: float) -> None:
    """A certificate is neither made larger by being written, nor lost at the radius it was issued for."""
    assert float(to_smoothing_tsv(_table((0, 0, radius))).splitlines()[1].split("\t")[3]) == radius
