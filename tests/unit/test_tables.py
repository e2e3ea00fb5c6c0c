"""Comparing tables: only results found under the same conditions are compared."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from proxyrob.certify import CertificateHeader, certify_classifier, read_certificates
from proxyrob.compare import (
    Comparison,
    Incomparable,
    compare_certificates,
    compare_paired,
    compare_verdicts,
    compare_where_possible,
)
from proxyrob.config import CertifyConfig
from proxyrob.evaluate import STANDARD_ATTACKS, VerdictHeader, robust_rows, tabulate_verdicts
from proxyrob.source import Split, read_split
from proxyrob.source.splits import SplitName, write_splits
from proxyrob.storage import Stage
from proxyrob.threat import parse_threat
from tests.conftest import MakeStage

NAMES: tuple[SplitName, ...] = ("train", "validation", "test")
N = 40
LABELS = np.arange(N) % 10
VERSIONS = {**dict.fromkeys(STANDARD_ATTACKS, "pyautoattack 0.2.0 standard"), "pgd-20": "proxyrob PGD"}


def _verdicts(broken: int, **values: Any) -> tuple[pd.DataFrame, VerdictHeader]:
    """A model that misclassifies one image, loses ``broken`` to APGD and half of them to PGD."""
    rows = np.arange(N)
    hits = {name: (rows < broken) & (name == "apgd-ce") for name in STANDARD_ATTACKS}
    predictions = np.where(rows == N - 1, LABELS + 1, LABELS)
    given: dict[str, Any] = {
        "norm": "linf",
        "epsilon": "3/20",
        "attacks": VERSIONS,
        "seed": 0,
        "split": "test",
        "model": str(broken),
        "data_sha256": "d",
        **values,
    }
    return tabulate_verdicts(LABELS, predictions, hits, {"pgd-20": rows < broken // 2}), VerdictHeader(**given)


def _certificates(right: int, **values: Any) -> tuple[pd.DataFrame, CertificateHeader]:
    """A model that certifies the first ``right`` images at 0.3, abstains on one and is wrong on the others."""
    predictions = pd.array([*LABELS[:right], *(LABELS[right:-1] + 1) % 10, None], dtype="Int64")
    radii = [0.3] * (N - 1) + [0.0]
    table = pd.DataFrame({"index": np.arange(N), "label": LABELS, "prediction": predictions, "radius_l2": radii})
    given: dict[str, Any] = {
        "sigma": 0.25,
        "n0": 10,
        "n": 100,
        "alpha": 0.01,
        "method": {"kind": "fixed"},
        "grid": None,
        "precision": "float32",
        "num_values": 9,
        "seed": 0,
        "split": "test",
        "model": str(right),
        "data_sha256": "d",
        **values,
    }
    return table, CertificateHeader(**given)


def test_verdicts_are_compared_by_each_accuracy() -> None:
    """Clean, PGD and AutoAttack, each by the images that withstood those attacks; candidate first."""
    candidate, reference = _verdicts(5), _verdicts(25)
    found = compare_verdicts(candidate, reference, margin=0.02, confidence=0.9)
    assert list(found) == ["clean", "pgd", "autoattack"]
    assert (found["clean"].difference, found["clean"].verdict) == (0.0, "UNDECIDED")
    assert found["pgd"].difference == pytest.approx((12 - 2) / N)
    assert (found["autoattack"].difference, found["autoattack"].candidate_only) == (0.5, 20)
    ours, theirs = (robust_rows(table, STANDARD_ATTACKS) for table, _ in (candidate, reference))
    assert found["autoattack"] == compare_paired(ours, theirs, margin=0.02, confidence=0.9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm", "l2"),
        ("epsilon", "8/255"),
        ("split", "validation"),
        ("data_sha256", "other"),
        ("attacks", {**VERSIONS, "square": "another version"}),
        ("attacks", {**dict.fromkeys(STANDARD_ATTACKS, "pyautoattack 0.2.0 standard"), "pgd-10": "proxyrob PGD"}),
    ],
)
def test_verdicts_under_other_conditions_are_not_compared(name: str, value: Any) -> None:
    """Another norm, epsilon, split, data set or attack is refused, naming the condition, both values and the remedy."""
    with pytest.raises(
        ValueError,
        match=f"these two evaluations cannot be compared: {name} is .* and .*; evaluate both alike: (run|evaluate) both",
    ):
        compare_verdicts(_verdicts(5), _verdicts(5, **{name: value}))


def test_only_the_attacks_that_differ_are_named() -> None:
    """An attack of another version, or one that only one of the two ran, with what there is of each."""
    changed = {**dict.fromkeys(STANDARD_ATTACKS, "pyautoattack 0.2.0 standard"), "square": "newer", "pgd-10": "proxyrob PGD"}
    with pytest.raises(ValueError, match="cannot be compared") as refused:
        compare_verdicts(_verdicts(5), _verdicts(5, attacks=changed))
    ours = {"square": "pyautoattack 0.2.0 standard", "pgd-20": "proxyrob PGD", "pgd-10": "not run"}
    theirs = {"square": "newer", "pgd-20": "not run", "pgd-10": "proxyrob PGD"}
    assert f"attacks is {ours} and {theirs}; evaluate both alike" in str(refused.value)


@pytest.mark.parametrize("cut", ["rows", "labels"])
def test_verdicts_on_other_images_are_not_compared(cut: str) -> None:
    """A subset, or the same images with other labels, is refused even where the data set is the same."""
    table, header = _verdicts(5)
    other = table.iloc[:-1] if cut == "rows" else table.assign(label=(table.label + 1) % 10)
    with pytest.raises(ValueError, match=f"they are of different images .40 and {len(other)}.; evaluate both alike"):
        compare_verdicts((table, header), (other, header))


def _ended_early(broken: int) -> tuple[pd.DataFrame, VerdictHeader]:
    """The same model, its attacks ended at a target: the last ten of its images were shown to APGD alone."""
    table, header = _verdicts(broken)
    table.loc[N - 10 :, ["apgd-t", "fab-t", "square"]] = pd.NA
    return table, header


def test_an_evaluation_that_ended_early_is_not_compared() -> None:
    """Images that nobody attacked to the end are no evidence of robustness: refused, with their number and the remedy."""
    reason = "9 of 40 images of the first were not attacked to the end; evaluate both without a target"  # one was wrong before
    with pytest.raises(ValueError, match=reason):
        compare_verdicts(_ended_early(5), _verdicts(25))
    both = "9 of 40 images of the first and 9 of 40 images of the second were not attacked"
    with pytest.raises(ValueError, match=both):
        compare_verdicts(_ended_early(5), _ended_early(25))
    found = compare_where_possible(_verdicts(5), _ended_early(25))
    assert isinstance(found["clean"], Comparison)
    assert isinstance(found["pgd"], Comparison)
    assert isinstance(found["autoattack"], Incomparable)
    assert found["autoattack"].verdict == "UNDECIDED"
    assert "images of the second" in found["autoattack"].reason


@pytest.mark.parametrize("name", ["seed", "model"])
def test_verdicts_of_another_seed_or_model_are_compared(name: str) -> None:
    """Comparing two models is the point, and another seed of the attack is no other condition."""
    other = _verdicts(5, **{name: 7 if name == "seed" else "other"})
    assert compare_verdicts(_verdicts(5), other)["autoattack"].difference == 0.0


def test_certificates_are_compared_at_each_radius() -> None:
    """A right class certified at least that far; abstentions and wrong classes count against."""
    found = compare_certificates(_certificates(30), _certificates(10), (0.0, 0.3, 0.31))
    assert list(found) == ["certified_0", "certified_0.3", "certified_0.31"]
    assert [found[name].difference for name in found] == [0.5, 0.5, 0.0]
    assert (found["certified_0.3"].candidate_only, found["certified_0.3"].verdict) == (20, "PASS")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sigma", 0.5),
        ("n0", 11),
        ("n", 101),
        ("alpha", 0.001),
        ("precision", "bfloat16"),
        ("split", "validation"),
        ("data_sha256", "other"),
    ],
)
def test_certificates_under_other_conditions_are_not_compared(name: str, value: Any) -> None:
    """Another noise, sample size, error probability, precision, split or data set is refused, naming it."""
    with pytest.raises(ValueError, match=f"these two certifications cannot be compared: {name} is .* and .*; certify both"):
        compare_certificates(_certificates(30), _certificates(30, **{name: value}), (0.0,))


def test_certificates_are_compared_at_linf_thresholds() -> None:
    """On nine values 1/10 is implied by an L2 radius of exactly 3/10, which 0.3 as a float64 falls short of; 1/11 by less."""
    linf = tuple(parse_threat(f"linf:{epsilon}") for epsilon in ("1/11", "1/10"))
    found = compare_certificates(_certificates(30), _certificates(10), (), linf)
    assert {name: row.difference for name, row in found.items()} == {"certified_linf_1/11": 0.5, "certified_linf_1/10": 0.0}


@pytest.mark.parametrize("sequential_first", [True, False])
def test_other_methods_are_compared_at_radii_of_both(sequential_first: bool) -> None:
    """What stopped when some radii were known is compared at these, with either method; another radius is refused."""
    sequential: dict[str, Any] = {"method": {"kind": "sequential"}, "grid": (0.0, 0.3)}
    pair = (_certificates(30, **sequential), _certificates(10))
    one, other = pair if sequential_first else pair[::-1]
    found = compare_certificates(one, other, (0.0, 0.3))
    assert abs(found["certified_0.3"].difference) == 0.5
    assert compare_certificates(pair[0], _certificates(10, **sequential), (0.0, 0.3)) == compare_certificates(*pair, (0.0, 0.3))
    with pytest.raises(ValueError, match=r"certified_0\.25 needs the answer at radius 0\.25.*sought those at 0, 0\.3 alone"):
        compare_certificates(one, other, (0.0, 0.25))
    with pytest.raises(ValueError, match="certified_linf_1/11 needs the answer at radius 0"):
        compare_certificates(one, other, (), (parse_threat("linf:1/11"),))


@pytest.mark.parametrize("column", ["index", "label"])
def test_certificates_of_other_images_are_not_compared(column: str) -> None:
    """Other rows or other labels are other images."""
    table, header = _certificates(30)
    other = table.copy()
    other.loc[3, column] += 1
    with pytest.raises(ValueError, match="they are of different images"):
        compare_certificates((table, header), (other, header), (0.0,))
    with pytest.raises(ValueError, match="they are of different images"):
        compare_certificates((table, header), (table.iloc[:-1], header), (0.0,))


def test_certificates_of_other_pixels_are_not_compared(digits: Stage, toy_classifier: Stage, make_stage: MakeStage) -> None:
    """Two data sets with the same labels are two data sets: verdicts on them are not compared, nor are certificates."""
    other = make_stage("source", negative=True)
    splits: dict[SplitName, Split] = {name: read_split(digits, name) for name in NAMES}
    negatives: dict[SplitName, tuple[np.ndarray, np.ndarray]] = {
        name: (255 - split.stored, split.labels) for name, split in splits.items()
    }
    write_splits(other, negatives, class_names=tuple("0123456789"))
    tables = []
    for source in (digits, other):
        stage = make_stage("certify", source=source.digest)
        config = CertifyConfig(num_images=5, n0=5, n=20, radii=(0.0,))
        certify_classifier(config, sigma=0.25, source=source, model=toy_classifier, seed=0, stage=stage)
        tables.append(read_certificates(stage))
    with pytest.raises(ValueError, match="these two certifications cannot be compared"):
        compare_certificates(tables[0], tables[1], (0.0,))
