"""The command that compares the models of runs: of two, or of several seeds on either side."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from flows.console import ModelOption, choose_variant, console, failures, find_run, plan_of, wrong_use

if TYPE_CHECKING:
    from flows.plan import Plan
    from proxyrob.compare import Comparison, SeedComparison
    from proxyrob.compare.tables import Verdicts
    from proxyrob.intervals import Measured

VERSUS = "vs"


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN | RUN… vs RUN…", help="Output folders of runs, their names, or the beginnings of those."
        ),
    ],
    model: ModelOption = None,
    their_model: Annotated[
        str | None, typer.Option("--their-model", help="That of the second side. Default: the released one.")
    ] = None,
) -> None:
    """Compare the models of two runs on the same images, or of two sets of runs seed by seed (RUN RUN vs RUN RUN).

    Two runs: McNemar's exact test, a paired interval and a bootstrap over images. Several seeds on either side: mean, standard
    deviation and the paired interval over seeds. Results under different threat models, attacks or images are refused.
    """
    with wrong_use():
        sides = [[plan_of(find_run(name)) for name in side] for side in split_sides(runs)]
        paired = pair_by_seed(*sides)
        stages = [
            (ours.variants[choose_variant(ours, model)].evaluate, theirs.variants[choose_variant(theirs, their_model)].evaluate)
            for ours, theirs in paired
        ]
        names = [
            f"{', '.join(plan.run_name for plan in side)} ({choose_variant(side[0], of)})"
            for side, of in zip(sides, (model, their_model), strict=True)
        ]
    from proxyrob.compare import compare_over_seeds, compare_verdicts
    from proxyrob.evaluate import read_verdicts

    with failures():
        tables = [(read_verdicts(ours), read_verdicts(theirs)) for ours, theirs in stages]
        if len(tables) == 1:
            ours, theirs = tables[0]
            rendered = render_pair(compare_verdicts(ours, theirs), _measure(ours), _measure(theirs), names)
        else:
            rendered = render_seeds(compare_over_seeds(tables), names, [plan.config.seed for plan, _ in paired])
    console.print(rendered)


def split_sides(runs: Sequence[str]) -> tuple[list[str], list[str]]:
    """The runs before and after ``vs``; two runs need none.

    Raises ``ValueError`` when it is not clear which side a run is on.
    """
    ours, theirs = list(runs[:1]), list(runs[1:])
    if VERSUS in runs:
        place = list(runs).index(VERSUS)
        ours, theirs = list(runs[:place]), list(runs[place + 1 :])
    elif len(runs) > 2:
        theirs = []
    if not ours or not theirs or VERSUS in theirs:
        raise ValueError(
            f"expected two runs, or several on either side of {VERSUS!r}, such as a-0 a-1 {VERSUS} b-0 b-1; "
            f"got {' '.join(runs)}"
        )
    return ours, theirs


def pair_by_seed(ours: Sequence["Plan"], theirs: Sequence["Plan"]) -> list[tuple["Plan", "Plan"]]:
    """Each run with that of the same seed on the other side; one on either side are a pair whatever their seeds.

    Raises ``ValueError`` when the runs of a side differ in more than the seed, or when a seed is missing or there twice.
    """
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    sides = [_by_seed(side) for side in (ours, theirs)]
    if sides[0].keys() != sides[1].keys():
        raise ValueError(
            f"expected the same seeds on both sides, got {_listed(sides[0])} and {_listed(sides[1])}; "
            "leave out those that have no partner, or run it with --set seed=N"
        )
    return [(sides[0][seed], sides[1][seed]) for seed in sorted(sides[0])]


def _by_seed(side: Sequence["Plan"]) -> dict[int, "Plan"]:
    from proxyrob.config import flatten

    settings = [flatten(plan.config) for plan in side]
    for plan, other in zip(side, settings, strict=True):
        differing = sorted(
            key
            for key in {*settings[0], *other} - {"seed"}
            if settings[0].get(key) != other.get(key) and not key.startswith("gate.")
        )
        if differing:
            raise ValueError(
                f"the runs of one side may differ in their seed alone, and {side[0].run_name} and {plan.run_name} differ in "
                f"{', '.join(differing)}; compare those that were made alike"
            )
    found = {plan.config.seed: plan for plan in side}
    if len(found) < len(side):
        raise ValueError(
            f"expected another seed for each run of a side, got {', '.join(str(plan.config.seed) for plan in side)}"
        )
    return found


def render_pair(
    found: Mapping[str, "Comparison"], ours: Mapping[str, "Measured"], theirs: Mapping[str, "Measured"], names: Sequence[str]
) -> Group:
    """Two models on the same images: accuracies, difference, test and verdict, and what the intervals cover."""
    table = _table("", "first", "second", "difference", "bootstrap", "p", "verdict")
    for figure, row in found.items():
        table.add_row(
            figure,
            _share(ours[figure]),
            _share(theirs[figure]),
            f"{100 * row.difference:+.1f} {_interval(row)}",
            _interval(row.bootstrap),
            f"{row.p_value:.1g}",
            row.verdict,
        )
    row = next(iter(found.values()))
    return Group(
        Text(f"{names[0]} − {names[1]}: accuracy in %, {row.n} images", style="bold"),
        table,
        _note(
            f"Parentheses are {100 * row.confidence:g} % intervals: of an accuracy Wilson's, of a difference the adjusted Wald "
            f"interval for paired images, then the percentile bootstrap of {row.bootstrap.resamples:,} resamples of the images "
            f"(seed {row.bootstrap.seed}); p is McNemar's exact test. They cover the choice of the images, for these two "
            "networks as they are: not another seed of their training. For that compare several: RUN RUN vs RUN RUN."
        ),
        _verdicts_explained("by the paired test"),
    )


def render_seeds(found: Mapping[str, "SeedComparison"], names: Sequence[str], seeds: Sequence[int]) -> Group:
    """Two ways of making a model, over several seeds: mean and spread of each, the difference and what its interval covers."""
    table = _table("", "first", "second", "difference", "seed by seed", "verdict")
    for figure, row in found.items():
        table.add_row(
            figure,
            *(f"{100 * side.mean:.1f} ± {100 * side.sd:.1f}" for side in (row.candidate, row.reference)),
            f"{100 * row.difference.mean:+.1f} {_interval(row)}",
            " ".join(f"{100 * value:+.1f}" for value in row.difference.values),
            row.verdict,
        )
    confidence = 100 * next(iter(found.values())).confidence
    return Group(
        Text(f"{names[0]} − {names[1]}: accuracy in %, seeds {', '.join(map(str, seeds))}", style="bold"),
        table,
        _note(
            f"Means ± standard deviations over {len(seeds)} seeds. Parentheses are Student's {confidence:g} % interval of the "
            "mean difference at equal seeds, not corrected for looking at several figures. It covers whatever the seed decides "
            "(cut of the data, proxy, training, attacks): not another data set and, where the seeds share test images, not "
            "other images. For one pair on its images: RUN RUN."
        ),
        _verdicts_explained("on average over seeds"),
    )


def _measure(side: "Verdicts") -> dict[str, "Measured"]:
    from proxyrob.compare.tables import accuracies_of
    from proxyrob.evaluate import robust_rows
    from proxyrob.intervals import measure_share

    table, header = side
    return {
        name: measure_share(int(robust_rows(table, attacks).sum()), len(table))
        for name, attacks in accuracies_of(header).items()
    }


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")  # eighty columns are enough
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    return table


def _share(found: "Measured") -> str:
    return f"{100 * found.value:.1f} ({100 * found.low:.1f}–{100 * found.high:.1f})"


def _interval(found: Any) -> str:
    return f"({100 * found.low:+.1f},{100 * found.high:+.1f})"  # one word: no terminal breaks it in two


def _note(text: str) -> Text:
    return Text(text, style="dim")


def _verdicts_explained(by: str) -> Text:
    return _note(f"PASS: the first is better {by}; FAIL: it is worse; UNDECIDED: neither is shown.")


def _listed(side: Mapping[int, "Plan"]) -> str:
    return ", ".join(str(seed) for seed in sorted(side))
