"""What the benchmark of attacks and certificates writes, and the sums that it makes."""

import argparse
from typing import Any

import numpy as np
import pytest

from benchmarks.attackers import FIRST_SHARE, SQUARE_QUERIES, STEPS, TARGETS, whole_seconds
from benchmarks.evaluation import KEYS, Bench
from benchmarks.smoothers import SIGMA, fixed_share, follow
from proxyrob.attacks import square
from proxyrob.certify import design_looks


def _bench(**values: Any) -> Bench:
    return Bench(argparse.Namespace(rounds=3, threads=1, **values))


def test_rows_have_the_keys_of_every_benchmark() -> None:
    """A ratio above 1 says that ours is ahead, whether the unit is seconds or samples per second."""
    bench = _bench()
    bench.row("a", "peer", [2.0, 6.0, 4.0], [1.0, 2.0, 4.0], "s", True)
    bench.row("b", "peer", [2.0, 6.0, 4.0], [1.0, 2.0, 4.0], "samples/s", False, votes=7)
    bench.skip("c", "peer", "it is not here")
    slow, fast, skipped = bench.rows
    assert KEYS == ("case", "peer", "peer_value", "value", "unit", "ratio", "rounds", "equal")
    assert [slow[key] for key in KEYS] == ["a", "peer", 4.0, 2.0, "s", 2.0, 3, True]
    assert [fast[key] for key in KEYS] == ["b", "peer", 4.0, 2.0, "samples/s", 0.5, 3, False]
    assert (slow["ratio_low"], slow["ratio_high"], fast["votes"]) == (1.0, 3.0, 7)
    assert skipped == {"case": "c", "peer": "peer", "skipped": "it is not here"}


def test_a_run_is_made_of_every_step_of_standard() -> None:
    """Pieces that take 1 s per step make a run of as many seconds as standard has steps; Square's sizes are its own."""
    pieces = dict.fromkeys(["apgd-t", "fab-t", *(f"square-{halvings}" for halvings in SQUARE_QUERIES)], 1.0)
    each = TARGETS * (2 * STEPS + 1) + square.QUERIES
    assert whole_seconds(pieces, first=7.0, withstood=2) == 7.0 + 2 * each
    halved = [min(max(sum(query > after for after in square.HALVED_AFTER), 2), 7) for query in range(square.QUERIES)]
    assert {halvings: halved.count(halvings) for halvings in SQUARE_QUERIES} == SQUARE_QUERIES
    assert FIRST_SHARE == square.FIRST_SHARE


@pytest.mark.parametrize("share", [0.6, 0.8, 0.9])
def test_what_a_design_does_is_what_draws_do(share: float) -> None:
    """The share that is certified and the samples that takes agree with a simulation; fixed n certifies about as many."""
    design = design_looks((0.15,), sigma=SIGMA, n=500, alpha=0.01, looks=20, early_share=0.2, futility=0.003)
    certified, samples = follow(design, share)
    generator, trials = np.random.default_rng(0), 4000
    votes, done, drawn, seen = np.zeros(trials, np.int64), np.zeros(trials, np.int64), np.zeros(trials), 0
    running = np.arange(trials)
    for look, total in enumerate(design.looks.tolist()):
        votes[running] += generator.binomial(total - seen, share, len(running))
        drawn[running], seen = total, total
        done[running], known = design.conclude(look, votes[running], done[running])
        running = running[~known]
    assert certified == pytest.approx(done.mean(), abs=0.04)
    assert samples == pytest.approx(drawn.mean(), rel=0.06)
    assert certified == pytest.approx(fixed_share(design, 500, 0.01, share), abs=0.05)
