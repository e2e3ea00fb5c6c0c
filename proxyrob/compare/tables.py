"""Comparing tables: only results found under the same conditions are compared."""

import numpy as np
import pandas as pd

from proxyrob.certify import CertificateHeader, certified_rows
from proxyrob.compare.paired import Comparison, Incomparable, compare_paired
from proxyrob.evaluate import STANDARD_ATTACKS, VerdictHeader, robust_rows
from proxyrob.threat import Threat

Verdicts = tuple[pd.DataFrame, VerdictHeader]
Certificates = tuple[pd.DataFrame, CertificateHeader]

REMEDIES = {
    "norm": "run both with the same threat",
    "epsilon": "run both with the same threat",
    "attacks": "run both with the same settings of evaluate, by the same version of this program",
    "split": "evaluate both on the same split",
    "subset": "evaluate both on the same number of images, drawn with the same seed",
    "data_sha256": "run both on the same source, cut with the same seed",
}


def compare_verdicts(
    candidate: Verdicts, reference: Verdicts, *, margin: float = 0.0, confidence: float = 0.95
) -> dict[str, Comparison]:
    """Compare two verdict tables by clean, PGD and AutoAttack accuracy.

    Raises ``ValueError`` when they were found under different conditions (norm, epsilon, attacks, split or images), and when
    one of them ended early at its target: images that nobody attacked to the end would count as robust.
    """
    found = compare_where_possible(candidate, reference, margin=margin, confidence=confidence)
    compared = {name: row for name, row in found.items() if isinstance(row, Comparison)}
    for row in found.values():
        if isinstance(row, Incomparable):
            raise ValueError(f"these two evaluations cannot be compared: {row.reason}")  # noqa: TRY004  (no type is wrong)
    return compared


def compare_where_possible(
    candidate: Verdicts, reference: Verdicts, *, margin: float = 0.0, confidence: float = 0.95
) -> dict[str, Comparison | Incomparable]:
    """As ``compare_verdicts``, but the figures that an early end leaves open are UNDECIDED, with the reason."""
    (table, header), (other_table, other_header) = candidate, reference
    require_same_conditions(header, other_header)
    if not are_of_same_images(table, other_table):
        raise ValueError(
            "these two evaluations cannot be compared: they are of different images "
            f"({len(table)} and {len(other_table)}); evaluate both alike: on the same images"
        )
    found: dict[str, Comparison | Incomparable] = {}
    for name, attacks in accuracies_of(header).items():
        spared = {"first": count_spared(table, attacks), "second": count_spared(other_table, attacks)}
        early = [f"{count} of {len(table)} images of the {which}" for which, count in spared.items() if count]
        if early:
            reason = f"attacks ended early, at a target: {' and '.join(early)} were not attacked to the end"
            found[name] = Incomparable(reason=f"{reason}; evaluate both without a target")
        else:
            ours, theirs = robust_rows(table, attacks), robust_rows(other_table, attacks)
            found[name] = compare_paired(ours, theirs, margin=margin, confidence=confidence)
    return found


def are_of_same_images(table: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether two tables have the same rows of the split, in the same order, with the same labels."""
    return np.array_equal(table["index"], other["index"]) and np.array_equal(table.label, other.label)


def count_spared(table: pd.DataFrame, attacks: tuple[str, ...]) -> int:
    """How many images no attack broke that not all of ``attacks`` were run on: nobody knows whether they would withstand."""
    return int((robust_rows(table, attacks) & table[list(attacks)].isna().any(axis=1)).sum())


def accuracies_of(header: VerdictHeader) -> dict[str, tuple[str, ...]]:
    """The accuracies that a verdict table gives, and the attacks that an image has to withstand to count."""
    (pgd_name,) = [name for name in header.attacks if name.startswith("pgd")]
    return {"clean": (), "pgd": (pgd_name,), "autoattack": STANDARD_ATTACKS}


def require_same_conditions(header: VerdictHeader, other: VerdictHeader, *, same_images: bool = True) -> None:
    """Raise ``ValueError``, saying what differs and what to do, unless two evaluations differ in model and seed alone.

    Without ``same_images`` they may be of other images, too.
    """
    for name, remedy in REMEDIES.items():
        ours, theirs = getattr(header, name), getattr(other, name)
        if ours == theirs or (name in {"subset", "data_sha256"} and not same_images):
            continue
        if isinstance(ours, dict):
            differing = [attack for attack in {**ours, **theirs} if ours.get(attack) != theirs.get(attack)]
            ours, theirs = ({attack: of.get(attack, "not run") for attack in differing} for of in (ours, theirs))
        raise ValueError(
            f"these two evaluations cannot be compared: {name} is {ours} and {theirs}; evaluate both alike: {remedy}"
        )


def compare_certificates(
    candidate: Certificates,
    reference: Certificates,
    radii: tuple[float, ...],
    linf: tuple[Threat, ...] = (),
    *,
    confidence: float = 0.95,
) -> dict[str, Comparison]:
    """Compare certified accuracy at each L2 radius and L∞ threshold.

    The keys are ``certified_<radius>`` and ``certified_linf_<threshold>``. Raises ``ValueError`` when sigma, n0, n, alpha,
    the precision of the network, the split or the data differ, and for a radius for which one of the two sought no answer.
    """
    (table, header), (other_table, other_header) = candidate, reference
    for name in ("sigma", "n0", "n", "alpha", "precision", "split", "subset", "data_sha256"):
        ours, theirs = getattr(header, name), getattr(other_header, name)
        if ours != theirs:
            raise ValueError(f"these two certifications cannot be compared: {name} is {ours} and {theirs}; certify both alike")
    if not are_of_same_images(table, other_table):
        raise ValueError("these two certifications cannot be compared: they are of different images")
    compared = {f"certified_{radius:g}": radius for radius in radii}
    compared |= {f"certified_linf_{threat.epsilon}": threat.enclosing_l2_radius(header.num_values) for threat in linf}
    for grid in (header.grid, other_header.grid):
        for name, radius in compared.items():
            if grid is not None and radius not in grid:
                known = ", ".join(f"{known:g}" for known in grid)
                raise ValueError(
                    f"these two certifications cannot be compared: {name} needs the answer at radius {radius:g}, and one of "
                    f"them sought those at {known} alone; certify both alike"
                )
    return {
        name: compare_paired(certified_rows(table, radius), certified_rows(other_table, radius), confidence=confidence)
        for name, radius in compared.items()
    }
