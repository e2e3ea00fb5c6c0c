"""Whole numbers in proportion to weights."""

import numpy as np
from jaxtyping import Float64, Int64


def share_out(count: int, weights: Int64[np.ndarray, " k"] | Float64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
    """``count`` in proportion to ``weights``, by largest remainder; equal remainders go to the earlier place.

    Of integers the remainders are exact. Of floats they are those of the rounded quotients, in which 50 shared as 0.3 to 0.9
    is the tie 12.5 to 37.5.
    """
    exact, unit = count * weights, weights.sum()
    if weights.dtype == np.float64:
        exact, unit = exact / unit, 1.0
    parts, remainders = np.divmod(exact, unit)
    parts = parts.astype(np.int64)
    parts[np.argsort(-remainders, kind="stable")[: count - int(parts.sum())]] += 1
    return parts
