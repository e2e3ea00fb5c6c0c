"""Threat models: a norm and an exact radius, in pixel units of [0,1]."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, cast, get_args

Norm = Literal["linf", "l2"]

LARGEST_EPSILON = {"linf": Fraction(1), "l2": Fraction(5)}


@dataclass(frozen=True)
class Threat:
    """All perturbations of an image whose norm is at most ``epsilon``.

    ``epsilon`` is an exact fraction: 127/255, 0.5 and 128/255 are three threat models, and results under different
    ones are never compared.
    """

    norm: Norm
    epsilon: Fraction

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"expected a norm out of {', '.join(get_args(Norm))}, got {self.norm!r}")
        largest = LARGEST_EPSILON[self.norm]
        if not 0 < self.epsilon <= largest:
            hint = (
                f"; did you mean '{self.norm}:{self.epsilon}/255'?"
                if self.epsilon.denominator == 1 and self.epsilon <= 255
                else ""
            )
            raise ValueError(
                f"expected an epsilon in (0, {largest}] for {self.norm}, in pixel units where black is 0 and white is 1, "
                f"got {self.epsilon}{hint}"
            )

    def __str__(self) -> str:
        return f"{self.norm}:{self.epsilon}"

    @property
    def label(self) -> str:
        """For people: ``L∞ ≤ 8/255``."""
        return f"{'L∞' if self.norm == 'linf' else 'L2'} ≤ {self.epsilon}"

    def enclosing_l2_radius(self, num_values: int) -> float:
        """The radius of the smallest L2 ball that contains these perturbations of an image of ``num_values`` values.

        That is epsilon for L2, and √d · epsilon for L∞. It is no decimal fraction: 2/255 on 3,072 values is 0.434711, where
        the usual 111/255 is 0.435294. The result is the least float64 that is not below it, found with exact fractions: a
        certificate that reaches it holds for the whole threat model.
        """
        factor = num_values if self.norm == "linf" else 1
        square = factor * self.epsilon**2
        radius = math.sqrt(factor) * float(self.epsilon)
        while Fraction(radius) ** 2 >= square:
            radius = math.nextafter(radius, 0.0)
        while Fraction(radius) ** 2 < square:
            radius = math.nextafter(radius, math.inf)
        return radius


def parse_threat(text: str) -> Threat:
    """Read ``linf:8/255``, ``l2:128/255`` or ``linf:0.15`` (a decimal is read exactly, as 3/20).

    Raises ``ValueError`` when the form, the norm or the range of epsilon is wrong.
    """
    match = re.fullmatch(r"\s*(\w+)\s*:\s*(\d+\s*/\s*\d+|\d*\.?\d+)\s*", text)
    if match is None:
        raise ValueError(f"expected a threat model such as 'linf:8/255' or 'l2:128/255', got {text!r}")
    norm, epsilon = match.groups()
    if norm not in get_args(Norm):
        raise ValueError(f"expected a norm out of {', '.join(get_args(Norm))}, got {norm!r} in {text!r}")
    try:
        return Threat(cast(Norm, norm), Fraction(epsilon.replace(" ", "")))
    except ZeroDivisionError as error:
        raise ValueError(f"expected an epsilon with a denominator that is not 0, got {text!r}") from error
