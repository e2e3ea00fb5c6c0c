"""One model attacked again: whether its robust accuracy holds against other seeds and a larger budget."""

from collections.abc import Sequence

import numpy as np

from proxyrob.compare.paired import Comparison, compare_paired
from proxyrob.compare.tables import Verdicts, are_of_same_images
from proxyrob.evaluate import STANDARD_ATTACKS, robust_rows


def compare_attacked_again(
    original: Verdicts, again: Sequence[Verdicts], *, margin: float = 0.0, confidence: float = 0.95
) -> Comparison:
    """Compare what withstood every attack of every evaluation in ``again`` with what withstood AutoAttack in ``original``.

    All are of one model on the same images; ``again`` may have other seeds and more steps of PGD, which counts, too. More
    attacks break more images: expect a difference below 0, and FAIL where it is sure to be larger than ``margin``.

    Raises ``ValueError`` when there is nothing to compare, or model, images, norm or epsilon differ.
    """
    table, header = original
    if not again:
        raise ValueError("expected at least one evaluation of the same model, got none")
    withstood = robust_rows(table, STANDARD_ATTACKS)
    still = np.ones(len(table), dtype=bool)
    for other, other_header in again:
        for name in ("model", "norm", "epsilon", "split", "data_sha256"):
            ours, theirs = getattr(header, name), getattr(other_header, name)
            if ours != theirs:
                raise ValueError(
                    f"these evaluations are not of the same model on the same images: {name} is {ours} and {theirs}"
                )
        if not are_of_same_images(table, other):
            raise ValueError(f"these evaluations are of different images ({len(table)} and {len(other)})")
        still &= robust_rows(other, tuple(other_header.attacks))
    return compare_paired(still, withstood, margin=margin, confidence=confidence)
