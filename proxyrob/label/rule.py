"""The paper's filter: which synthetic images keep a label (Sehwag et al. 2021, appendix)."""

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64

AGREE = "labelers agree"
SURE = "labelers disagree, one is sure"
UNSURE = "labelers disagree, both unsure"
GIVEN = "given with the images"
LEAK = "near-duplicate of a test image"


def apply_rule(
    ids: Int64[np.ndarray, " n"],
    first: Float[np.ndarray, "n k"],
    second: Float[np.ndarray, "n k"],
    threshold: float,
) -> pd.DataFrame:
    """One row per image from both labelers' class probabilities.

    An image is dropped when the classes differ and both confidences are below ``threshold``. Its label is the class of
    the more confident labeler. Columns: ``id, label, first_class, first_confidence, second_class, second_confidence,
    kept, reason``.
    """
    classes = first.argmax(axis=1), second.argmax(axis=1)
    confidences = first.max(axis=1), second.max(axis=1)
    agree = classes[0] == classes[1]
    sure = np.maximum(*confidences) >= threshold
    return pd.DataFrame(
        {
            "id": ids,
            "label": np.where(confidences[0] >= confidences[1], classes[0], classes[1]),
            "first_class": classes[0],
            "first_confidence": confidences[0],
            "second_class": classes[1],
            "second_confidence": confidences[1],
            "kept": agree | sure,
            "reason": np.select([agree, sure], [AGREE, SURE], UNSURE),
        }
    )
