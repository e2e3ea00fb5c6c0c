"""Threat models: exact fractions, and errors that say what to write instead."""

from fractions import Fraction

import pytest

from proxyrob.threat import Norm, Threat, parse_threat


@pytest.mark.parametrize(
    ("text", "norm", "epsilon"),
    [
        ("linf:8/255", "linf", Fraction(8, 255)),
        ("l2:128/255", "l2", Fraction(128, 255)),
        ("linf:0.15", "linf", Fraction(3, 20)),
        ("linf:.5", "linf", Fraction(1, 2)),
        (" linf : 16 / 255 ", "linf", Fraction(16, 255)),
        ("linf:1", "linf", Fraction(1)),
        ("l2:5", "l2", Fraction(5)),
    ],
)
def test_a_threat_is_read_as_an_exact_fraction(text: str, norm: Norm, epsilon: Fraction) -> None:
    """Fractions and decimals are read exactly, up to the largest allowed radius of each norm."""
    assert parse_threat(text) == Threat(norm, epsilon)


def test_neighbouring_epsilons_are_different_threats() -> None:
    """127/255, 0.5 and 128/255 are three threat models."""
    assert len({parse_threat(f"l2:{epsilon}") for epsilon in ("127/255", "0.5", "128/255")}) == 3


def test_equal_epsilons_written_differently_are_the_same_threat() -> None:
    """A fraction is reduced, so that 16/510 and 8/255 are equal and print alike."""
    assert parse_threat("linf:16/510") == parse_threat("linf:8/255")
    assert str(parse_threat("linf:16/510")) == "linf:8/255"


@pytest.mark.parametrize(("norm", "text"), [("linf", "linf:8"), ("l2", "l2:128")])
def test_an_epsilon_in_grey_levels_is_refused_with_the_right_spelling(norm: Norm, text: str) -> None:
    """8 instead of 8/255 is the classic mistake; the error shows the text that was meant, and that text is valid."""
    with pytest.raises(ValueError, match=r"pixel units.*did you mean") as error:
        parse_threat(text)
    meant = str(error.value).split("did you mean '")[1].split("'")[0]
    assert parse_threat(meant) == Threat(norm, Fraction(text.split(":")[1]) / 255)


def test_the_suggestion_for_a_decimal_in_grey_levels_is_a_threat_that_can_be_read() -> None:
    """Whatever the error suggests for 8.5 can be typed back in: a suggestion that is itself refused helps nobody."""
    with pytest.raises(ValueError, match="pixel units") as error:
        parse_threat("linf:8.5")
    if "did you mean '" in str(error.value):
        meant = str(error.value).split("did you mean '")[1].split("'")[0]
        assert parse_threat(meant) == Threat("linf", Fraction(17, 510))


@pytest.mark.parametrize("text", ["linf:0", "linf:0/255", "l2:0.0", "linf:256/255", "l2:5.01", "linf:300"])
def test_an_epsilon_out_of_range_is_refused_with_the_range(text: str) -> None:
    """Zero and radii beyond the largest sensible one are refused, and the message gives the range."""
    with pytest.raises(ValueError, match=r"expected an epsilon in \(0, [15]\]"):
        parse_threat(text)


def test_an_absurd_epsilon_gets_no_suggestion() -> None:
    """300 is no grey level, so the error does not pretend to know what was meant."""
    with pytest.raises(ValueError, match="got 300") as error:
        parse_threat("linf:300")
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize("text", ["l1:8/255", "Linf:8/255", "inf:0.1"])
def test_an_unknown_norm_is_refused_with_the_known_ones(text: str) -> None:
    """Only linf and l2 exist, spelled so."""
    with pytest.raises(ValueError, match="expected a norm out of linf, l2, got"):
        parse_threat(text)


@pytest.mark.parametrize(
    "text", ["", "linf", "linf:", "8/255", "linf:8/", "linf:-0.1", "linf:1e-1", "linf:0.1 0.2", "linf:nan"]
)
def test_another_form_is_refused_with_an_example(text: str) -> None:
    """Anything that is not norm:number is refused, and the message shows the form."""
    with pytest.raises(ValueError, match=r"such as 'linf:8/255'"):
        parse_threat(text)


def test_a_denominator_of_zero_is_refused_as_a_value_error() -> None:
    """8/0 is a wrong argument, not a ZeroDivisionError."""
    with pytest.raises(ValueError, match="denominator that is not 0"):
        parse_threat("linf:8/0")


def test_a_threat_made_directly_is_checked_too() -> None:
    """The class itself refuses what the parser refuses."""
    with pytest.raises(ValueError, match="expected an epsilon"):
        Threat("linf", Fraction(2))


@pytest.mark.parametrize(("norm", "label"), [("linf", "L∞ ≤ 8/255"), ("l2", "L2 ≤ 8/255")])
def test_the_label_names_norm_and_fraction(norm: Norm, label: str) -> None:
    """People read the fraction, never its decimals."""
    assert Threat(norm, Fraction(8, 255)).label == label


@pytest.mark.parametrize(
    ("text", "num_values", "radius"),
    [
        ("linf:2/255", 3072, 0.434711),
        ("linf:8/255", 3072, 1.738843),
        ("linf:8/255", 64, 64 / 255),
        ("l2:128/255", 3072, 128 / 255),
    ],
)
def test_the_enclosing_l2_radius_is_exact(text: str, num_values: int, radius: float) -> None:
    """√d · epsilon: 0.434711 for 2/255 on CIFAR-10, where 111/255 would be 0.435294; L2 encloses itself."""
    assert parse_threat(text).enclosing_l2_radius(num_values) == pytest.approx(radius, abs=1e-6)
