"""What commands share."""

import re

import pytest

from flows.console import choose_by_name

RUNS = {"digits-ab": 1, "digits-ab12": 2, "cifar-ab": 3}
SETS = {"sets/edm": 1, "sets/edm-large": 2, "samples/ab12": 3}


@pytest.mark.parametrize(
    ("name", "named", "chosen"),
    [
        ("digits-ab", RUNS, 1),
        ("digits-ab1", RUNS, 2),
        ("c", RUNS, 3),
        ("sets/edm", SETS, 1),
        ("edm-", SETS, 2),
        ("ab", SETS, 3),
    ],
)
def test_a_name_or_a_clear_beginning_is_enough(name: str, named: dict[str, int], chosen: int) -> None:
    """A whole name is chosen though another begins so; of a name with slashes its last part counts."""
    assert choose_by_name(name, named, "run", "here") == chosen


@pytest.mark.parametrize(
    ("name", "named", "text"),
    [
        ("digits", RUNS, "'digits' may be any of these runs: digits-ab, digits-ab12 (in /runs)"),
        ("12", RUNS, "there is no run '12'; runs: digits-ab, digits-ab12, cifar-ab (in /runs)"),
        ("sets/edm-", SETS, "there is no run 'sets/edm-'; runs: sets/edm, sets/edm-large, samples/ab12 (in /runs)"),
        ("x", {}, "there is no run 'x'; runs: none yet (in /runs)"),
    ],
)
def test_what_there_is_to_choose_from_is_told(name: str, named: dict[str, int], text: str) -> None:
    """An ambiguous or unknown name lists those it may mean, or all."""
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        choose_by_name(name, named, "run", "in /runs")
