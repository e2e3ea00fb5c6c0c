"""The paper's filter: which synthetic images keep a label."""

import numpy as np
import pytest

from proxyrob.label.rule import AGREE, SURE, UNSURE, apply_rule

FIRST, SECOND = 0, 2


def _votes(chosen: int, confidence: float) -> np.ndarray:
    """Probabilities of three classes, the rest of them on class 1."""
    row = np.zeros((1, 3))
    row[0, chosen] = confidence
    row[0, 1] += 1.0 - confidence
    return row


@pytest.mark.parametrize(
    ("first", "second", "label", "kept", "reason"),
    [
        ((FIRST, 0.95), (FIRST, 0.99), FIRST, True, AGREE),
        ((FIRST, 0.6), (FIRST, 0.55), FIRST, True, AGREE),
        ((FIRST, 0.95), (SECOND, 0.8), FIRST, True, SURE),
        ((FIRST, 0.8), (SECOND, 0.95), SECOND, True, SURE),
        ((FIRST, 0.99), (SECOND, 0.95), FIRST, True, SURE),
        ((FIRST, 0.9), (SECOND, 0.8), FIRST, True, SURE),
        ((FIRST, 0.8), (SECOND, 0.9), SECOND, True, SURE),
        ((FIRST, 0.89), (SECOND, 0.85), FIRST, False, UNSURE),
        ((FIRST, 0.6), (SECOND, 0.7), SECOND, False, UNSURE),
    ],
    ids=[
        "agree, both sure",
        "agree, both unsure",
        "disagree, first sure",
        "disagree, second sure",
        "disagree, both sure",
        "disagree, first at the threshold",
        "disagree, second at the threshold",
        "disagree, both just unsure",
        "disagree, both unsure",
    ],
)
def test_the_rule(first: tuple[int, float], second: tuple[int, float], label: int, kept: bool, reason: str) -> None:
    """Dropped only when the labelers disagree and both are below the threshold; the more confident one's class is the label."""
    (row,) = apply_rule(np.array([7]), _votes(*first), _votes(*second), 0.9).to_dict("records")
    assert (row["id"], row["label"], row["kept"], row["reason"]) == (7, label, kept, reason)
    assert (row["first_class"], row["second_class"]) == (first[0], second[0])
    assert (row["first_confidence"], row["second_confidence"]) == pytest.approx((first[1], second[1]))


def test_rows_keep_their_order_and_ids() -> None:
    """Every image has one row, under its own id."""
    first = np.concatenate([_votes(FIRST, 0.95), _votes(SECOND, 0.6), _votes(FIRST, 0.6)])
    second = np.concatenate([_votes(FIRST, 0.95), _votes(FIRST, 0.7), _votes(FIRST, 0.7)])
    table = apply_rule(np.array([50, 51, 52]), first, second, 0.9)
    assert table.id.tolist() == [50, 51, 52]
    assert table.kept.tolist() == [True, False, True]
    assert table.label.tolist() == [FIRST, FIRST, FIRST]


def test_the_threshold_is_used() -> None:
    """Threshold 0 keeps everything, threshold 1 keeps only what the labelers agree on (or are certain of)."""
    votes = _votes(FIRST, 0.6), _votes(SECOND, 0.7)
    assert apply_rule(np.array([0]), *votes, 0.0).kept.tolist() == [True]
    assert apply_rule(np.array([0]), *votes, 0.65).kept.tolist() == [True]
    assert apply_rule(np.array([0]), *votes, 1.0).kept.tolist() == [False]


def test_equally_confident_labelers_that_disagree_give_the_first_ones_class() -> None:
    """A tie is decided, and always alike."""
    assert apply_rule(np.array([0]), _votes(FIRST, 0.95), _votes(SECOND, 0.95), 0.9).label.tolist() == [FIRST]
