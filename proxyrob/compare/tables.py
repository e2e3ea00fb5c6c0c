"""Comparing tables: only results found under the same conditions are compared."""

import numpy as np
import pandas as pd

from proxyrob.certify import CertificateHeader
from proxyrob.compare.paired import Comparison, compare_paired
from proxyrob.evaluate import STANDARD_ATTACKS, VerdictHeader, robust_rows

Verdicts = tuple[pd.DataFrame, VerdictHeader]
Certificates = tuple[pd.DataFrame, CertificateHeader]


def compare_verdicts(
    candidate: Verdicts, reference: Verdicts, *, margin: float = 0.0, confidence: float = 0.95
) -> dict[str, Comparison]:
    """Compare two verdict tables by clean, PGD and AutoAttack accuracy.

    Raises ``ValueError`` when they were found under different conditions: norm, epsilon, attacks, split or images.
    """
    (table, header), (other_table, other_header) = candidate, reference
    for name in ("norm", "epsilon", "attacks", "split", "data_sha256"):
        ours, theirs = getattr(header, name), getattr(other_header, name)
        if ours != theirs:
            raise ValueError(f"these two evaluations cannot be compared: {name} is {ours} and {theirs}; evaluate both alike")
    (pgd_name,) = [name for name in header.attacks if name.startswith("pgd")]
    sets: dict[str, tuple[str, ...]] = {"clean": (), "pgd": (pgd_name,), "autoattack": STANDARD_ATTACKS}
    return {
        name: compare_paired(
            robust_rows(table, attacks), robust_rows(other_table, attacks), margin=margin, confidence=confidence
        )
        for name, attacks in sets.items()
    }


def compare_certificates(
    candidate: Certificates, reference: Certificates, radii: tuple[float, ...], *, confidence: float = 0.95
) -> dict[str, Comparison]:
    """Compare certified accuracy at each radius; the keys are ``certified_<radius>``.

    Raises ``ValueError`` when sigma, n0, n, alpha, the split or the data differ.
    """
    (table, header), (other_table, other_header) = candidate, reference
    for name in ("sigma", "n0", "n", "alpha", "split", "data_sha256"):
        ours, theirs = getattr(header, name), getattr(other_header, name)
        if ours != theirs:
            raise ValueError(f"these two certifications cannot be compared: {name} is {ours} and {theirs}; certify both alike")
    if not np.array_equal(table["index"], other_table["index"]) or not np.array_equal(table.label, other_table.label):
        raise ValueError("these two certifications cannot be compared: they are of different images")

    def certified(rows: pd.DataFrame, radius: float) -> np.ndarray:
        return (rows.prediction == rows.label).fillna(False).to_numpy(dtype=bool) & (rows.radius_l2 >= radius).to_numpy()

    return {
        f"certified_{radius:g}": compare_paired(certified(table, radius), certified(other_table, radius), confidence=confidence)
        for radius in radii
    }
