"""The command that compares runs: who is compared with whom, and what is said of it."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType

from flows.cli.compare import pair_by_seed, render_pair, render_seeds, split_sides
from flows.plan import Plan, plan_pipeline
from proxyrob.compare import compare_paired, summarise_seeds
from proxyrob.config import load_config
from proxyrob.intervals import measure_share


def _plans(*seeds: int, changes: tuple[str, ...] = ()) -> list[Plan]:
    return [plan_pipeline(load_config("digits", [f"seed={seed}", *changes]), Path("store")) for seed in seeds]


def _text(rendered: RenderableType, width: int = 120) -> str:
    """What stands on a terminal, with single spaces."""
    console = Console(width=width, record=True, file=None)
    with console.capture() as captured:
        console.print(rendered)
    return " ".join(captured.get().split())


@pytest.mark.parametrize(
    ("runs", "ours", "theirs"),
    [
        (["a", "b"], ["a"], ["b"]),
        (["a", "vs", "b"], ["a"], ["b"]),
        (["a", "b", "vs", "c", "d"], ["a", "b"], ["c", "d"]),
        (["a", "b", "vs", "c"], ["a", "b"], ["c"]),
    ],
)
def test_the_sides_of_a_comparison(runs: list[str], ours: list[str], theirs: list[str]) -> None:
    """Two runs are a side each; more have a word between them."""
    assert split_sides(runs) == (ours, theirs)


@pytest.mark.parametrize("runs", [["a"], ["a", "b", "c"], ["vs", "a"], ["a", "vs"], ["a", "vs", "b", "vs", "c"]])
def test_unclear_sides_are_refused(runs: list[str]) -> None:
    """One run, three without a word between them, or an empty side: the message shows how."""
    with pytest.raises(ValueError, match=f"expected two runs, or several on either side of 'vs'.*got {' '.join(runs)}"):
        split_sides(runs)


def test_runs_are_paired_by_their_seeds() -> None:
    """In whatever order they are given; a single pair may have two seeds."""
    ours, theirs = _plans(2, 0, 1), _plans(1, 2, 0, changes=("train.gamma=0.4",))
    paired = pair_by_seed(ours, theirs)
    assert [(one.config.seed, other.config.seed) for one, other in paired] == [(0, 0), (1, 1), (2, 2)]
    assert all(one in ours and other in theirs for one, other in paired)
    (alone,) = pair_by_seed(_plans(0), _plans(3))
    assert (alone[0].config.seed, alone[1].config.seed) == (0, 3)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ((0, 1), (0, 2), "expected the same seeds on both sides, got 0, 1 and 0, 2"),
        ((0, 1), (0,), "expected the same seeds on both sides, got 0, 1 and 0"),
        ((0, 0), (0, 1), "expected another seed for each run of a side, got 0, 0"),
    ],
)
def test_seeds_without_a_partner_are_refused(ours: tuple[int, ...], theirs: tuple[int, ...], message: str) -> None:
    """Every seed once on each side."""
    with pytest.raises(ValueError, match=message):
        pair_by_seed(_plans(*ours), _plans(*theirs))


def test_runs_of_a_side_have_to_be_made_alike() -> None:
    """A spread over two settings is no spread over seeds; the setting is named. What the gate asks does not matter."""
    other = _plans(1, changes=("train.gamma=0.4", "certify.n=20000"))
    with pytest.raises(ValueError, match=r"may differ in their seed alone, .* differ in certify\.n, train\.gamma; compare"):
        pair_by_seed([*_plans(0), *other], _plans(0, 1))
    pair_by_seed([*_plans(0), *_plans(1, changes=("gate.margin=0.01",))], _plans(0, 1))


def test_a_pair_is_shown_with_what_its_intervals_cover() -> None:
    """Accuracies with Wilson's intervals, the difference with two, the test, the verdict, and that no seed is covered."""
    candidate, reference = np.arange(200) < 150, np.arange(200) < 120
    found = {"autoattack": compare_paired(candidate, reference)}
    ours, theirs = ({"autoattack": measure_share(int(right.sum()), 200)} for right in (candidate, reference))
    text = _text(render_pair(found, ours, theirs, ("a (mixed)", "b (mixed)")))
    assert text.startswith("a (mixed) − b (mixed): accuracy in %, 200 images")
    row = found["autoattack"]
    assert "75.0 (68.6–80.5) 60.0 (53.1–66.5) +15.0" in text
    assert (
        f"({100 * row.low:+.1f},{100 * row.high:+.1f}) ({100 * row.bootstrap.low:+.1f},{100 * row.bootstrap.high:+.1f})" in text
    )
    assert "PASS" in text
    assert "10,000 resamples of the images (seed 0)" in text
    assert "not another seed of their training" in text


def test_seeds_are_shown_with_mean_spread_and_each_difference() -> None:
    """Both sides' means and deviations, the difference with its interval, every seed's, and what the interval covers."""
    found = {"autoattack": summarise_seeds((0.61, 0.66, 0.64), (0.55, 0.58, 0.54))}
    text = _text(render_seeds(found, ("a, b, c (mixed)", "d, e, f (mixed)"), (0, 1, 2)))
    row = found["autoattack"]
    assert text.startswith("a, b, c (mixed) − d, e, f (mixed): accuracy in %, seeds 0, 1, 2")
    assert f"63.7 ± 2.5 55.7 ± 2.1 +8.0 ({100 * row.low:+.1f},{100 * row.high:+.1f}) +6.0 +8.0 +10.0 PASS" in text
    assert "over 3 seeds" in text
    assert "It covers whatever the seed decides" in text
    assert "not another data set" in text


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_a_terminal(width: int) -> None:
    """Where it is narrow no figure is cut off or broken in two."""
    row = compare_paired(np.arange(200) < 150, np.arange(200) >= 150)
    figures = {"autoattack": measure_share(150, 200)}
    words = _text(render_pair({"autoattack": row}, figures, figures, ("a", "b")), width).split()
    expected = ["(68.6–80.5)", f"({100 * row.low:+.1f},{100 * row.high:+.1f})", f"{row.p_value:.1g}", row.verdict]
    assert set(expected) <= set(words)
