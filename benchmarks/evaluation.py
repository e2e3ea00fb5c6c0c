"""How long do AutoAttack and certificates take? Ours, and the programs of others, on the same network and images.

    .venv/bin/python benchmarks/evaluation.py --cifar FOLDER --json evaluation.json              # half an hour on one core
    .venv/bin/python benchmarks/evaluation.py --cifar FOLDER --quick                             # nine minutes on one core
    .venv/bin/python benchmarks/evaluation.py --cifar FOLDER --cases agreement --agree 116       # hours

The network is the ResNet-18 that comes with pyautoattack. It is not trained to be robust: of the images of CIFAR-10 about 40 %
withstand ε = 1/255 and none 8/255. Ours and the peer take turns, A B A B …, in one process that is pinned to ``--threads``
cores; the medians over rounds are printed with their ratio, which is above 1 where ours is ahead. With one thread seconds are
those that the processor spent (``clock`` of a row says so), which other programs on the machine disturb less.

A run of *standard* is put together from pieces, see ``benchmarks/attackers.py``, and ``equal`` says that APGD on the
cross-entropy, which every round runs whole, breaks the same images; the case ``verdicts`` makes whole runs, once, and compares
what each attack breaks. ``agreement`` compares the modes ``gate`` and ``standard`` of ours on more images.

Attacks need real images: ``--cifar`` names a folder with CIFAR-10 as parquet, and ``--cifar-file`` a file without loss in it.
Smoothing takes the same time for any image; without ``--cifar`` they are random. Its peer is the checkout
``$PROXYROB_PEERS/smoothing`` (locuslab/smoothing), which imports statsmodels (of the extra ``dev``).
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.attackers import PEER, SQUARE_QUERIES, Contest, Seconds, peer_network, stopwatch, whole_seconds
from benchmarks.smoothers import SIGMA, Votes, fixed_share, follow, load_peer, published_shares
from proxyrob.certify import design_looks
from proxyrob.config.certify import CertifyConfig, SequentialMethod
from proxyrob.source.encoded import open_parquet
from proxyrob.threat import parse_threat

SOME_SURVIVE, MOST_BREAK = "linf:1/255", "linf:8/255"
RADII = (0.25, 0.5)
CERTIFIED_AT_ONCE = 6
NUM_AGREEMENT = 128
SMOOTHING = "locuslab/smoothing"
CASES = ("some-survive", "most-break", "verdicts", "agreement", "smoothing", "certify-radius")
KEYS = ("case", "peer", "peer_value", "value", "unit", "ratio", "rounds", "equal")

Row = dict[str, Any]


class Bench:
    """What the cases share: images, sizes, and the rows found so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.rounds = arguments, arguments.rounds
        self.clock = "cpu" if arguments.threads == 1 else "wall"
        place = Path(os.environ["PROXYROB_PEERS"]) / "smoothing" if "PROXYROB_PEERS" in os.environ else None
        self.checkout = place if place is not None and place.is_dir() else None
        self.rows: list[Row] = []

    def seconds(self, taken: Seconds) -> float:
        return taken[0] if self.clock == "cpu" else taken[1]

    def row(
        self, case: str, peer: str, peers: list[float], ours: list[float], unit: str, equal: bool | None, **more: Any
    ) -> None:
        """Add and print a row; a unit per second is the better the larger."""
        peer_value, value = median(peers), median(ours)
        pairs = [b / a if unit.endswith("/s") else a / b for a, b in zip(peers, ours, strict=True)]
        ratio = value / peer_value if unit.endswith("/s") else peer_value / value
        row = dict(zip(KEYS, (case, peer, peer_value, value, unit, ratio, len(ours), equal), strict=True))
        row |= {"ratio_low": min(pairs), "ratio_high": max(pairs), "clock": self.clock}
        self.rows.append(row | {"load": round(os.getloadavg()[0], 1), **more})
        verdict = {True: "equal", False: "NOT EQUAL", None: ""}[equal]
        print(f"{case:<26} {peer:<22} {peer_value:>10.3f} {value:>10.3f} {unit:<10} {ratio:>7.2f}x  {verdict}", flush=True)

    def skip(self, case: str, peer: str, reason: str) -> None:
        self.rows.append({"case": case, "peer": peer, "skipped": reason})
        print(f"{case:<26} {peer:<22} skipped: {reason}", flush=True)

    def images(self, count: int) -> tuple[Tensor, Tensor] | None:
        """The first images of CIFAR-10 that the network classifies correctly, and their labels."""
        folder = self.arguments.cifar
        if folder is None:
            return None
        pixels, labels = next(open_parquet(folder / self.arguments.cifar_file).read())
        if labels is None:
            sys.exit(f"{folder / self.arguments.cifar_file} has no labels; choose another --cifar-file")
        images = torch.from_numpy(pixels[: 2 * count]).permute(0, 3, 1, 2).float().div(255).contiguous()
        targets = torch.from_numpy(labels[: 2 * count])
        with torch.inference_mode():
            rows = (torch.cat([peer_network()(part) for part in images.split(64)]).argmax(1) == targets).nonzero().squeeze(1)
        return images[rows[:count]], targets[rows[:count]]


# ---- AutoAttack


def run_some_survive(bench: Bench, images: Tensor, labels: Tensor) -> None:
    """Pieces of a run in which some images withstand everything, and the whole run that they make."""
    who = [PEER, "standard", "gate", "plain"]
    contest = Contest(peer_network(), parse_threat(SOME_SURVIVE), images[:2])
    standing = (~contest.whole_apgd("gate", images, labels)).nonzero().squeeze(1)
    few = (images[standing], labels[standing])
    some = slice(0, bench.arguments.images)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in who}
    verdicts: dict[str, Tensor] = {}
    plan = ["apgd-ce", "apgd-t", "fab-t", *(f"square-{halvings}" for halvings in SQUARE_QUERIES)]
    for number in range(bench.rounds):
        print(f"some-survive: round {number + 1} of {bench.rounds}, {len(standing)} of {len(images)} stand …", flush=True)
        for piece in plan:
            attack, _, halvings = piece.partition("-")
            for name in who:
                if piece == "apgd-ce":
                    given = images[some], labels[some]
                    verdicts[name], taken = stopwatch(partial(contest.whole_apgd, name, *given))
                elif attack != "square":
                    taken = contest.piece(name, piece, *few)
                elif name == PEER and piece != plan[3]:  # it reads whole images, whatever has changed
                    found[name].setdefault(piece, []).append(found[name][plan[3]][number])
                    continue
                else:
                    taken = contest.piece(name, attack, *few, halvings=int(halvings))
                found[name].setdefault(piece, []).append(bench.seconds(taken))
    count = min(len(images), bench.arguments.images)
    share = len(standing) / len(images)
    whole = {
        name: [
            whole_seconds({piece: taken[number] for piece, taken in pieces.items()}, pieces["apgd-ce"][number], count * share)
            / count
            for number in range(bench.rounds)
        ]
        for name, pieces in found.items()
    }
    told = {"images": count, "batch": len(standing), "share_after_apgd_ce": share, "threat": SOME_SURVIVE}
    for case, ours, peer in (
        ("standard-some-survive", "standard", PEER),
        ("standard-some-survive", "standard", "plain"),
        ("gate", "gate", PEER),
        ("gate", "gate", "plain"),
    ):
        equal = bool((verdicts[ours] == verdicts[peer]).all())
        bench.row(case, peer, whole[peer], whole[ours], "s/image", equal, **told)
        if peer == PEER:
            for piece in plan:
                unit = "s" if piece == "apgd-ce" else "s/step"
                bench.row(f"{case}, {piece}", peer, found[peer][piece], found[ours][piece], unit, None, **told)


def run_most_break(bench: Bench, images: Tensor, labels: Tensor) -> None:
    """APGD on the cross-entropy where it breaks every image: nothing is left for the other attacks."""
    contest = Contest(peer_network(), parse_threat(MOST_BREAK), images[:2])
    some = images[: bench.arguments.images], labels[: bench.arguments.images]
    found: dict[str, list[float]] = {PEER: [], "standard": [], "gate": [], "plain": []}
    verdicts: dict[str, Tensor] = {}
    for mode in ("standard", "gate"):
        contest.whole_apgd(mode, images[:2], labels[:2])  # the first reading rearranges weights
    for number in range(bench.rounds):
        print(f"most-break: round {number + 1} of {bench.rounds} …", flush=True)
        for name, values in found.items():
            verdicts[name], taken = stopwatch(partial(contest.whole_apgd, name, *some))
            values.append(bench.seconds(taken) / len(some[0]))
    told = {"images": len(some[0]), "withstood": int((~verdicts[PEER]).sum()), "threat": MOST_BREAK}
    for case, ours, peer in (
        ("standard-most-break", "standard", PEER),
        ("standard-most-break", "standard", "plain"),
        ("gate-most-break", "gate", PEER),
    ):
        equal = bool((verdicts[ours] == verdicts[peer]).all())
        bench.row(case, peer, found[peer], found[ours], "s/image", equal, **told)


def run_verdicts(bench: Bench, images: Tensor, labels: Tensor) -> None:
    """Whole runs, once each: what every attack breaks, image by image."""
    contest = Contest(peer_network(), parse_threat(SOME_SURVIVE), images[:2])
    some = images[: bench.arguments.verdicts], labels[: bench.arguments.verdicts]
    runs = {name: stopwatch(partial(contest.whole_run, name, *some)) for name in (PEER, "standard", "gate")}
    expected, theirs = runs[PEER]
    withstood = len(some[0]) - sum(map(sum, expected.values()))
    for name, case in (("standard", "standard-verdicts"), ("gate", "gate-verdicts")):
        verdicts, taken = runs[name]
        broken = {attack: sum(hits) for attack, hits in verdicts.items()}
        told = {"images": len(some[0]), "withstood": withstood, "broken": broken, "threat": SOME_SURVIVE}
        same = verdicts == expected if name == "standard" else _broken(verdicts) == _broken(expected)
        bench.row(case, PEER, [bench.seconds(theirs)], [bench.seconds(taken)], "s", same, **told)


def run_agreement(bench: Bench, images: Tensor, labels: Tensor) -> None:
    """Verdicts of mode gate beside those of our standard. At 1/255, of APGD on the cross-entropy first, then of whole runs,
    after the images of the case ``verdicts``, which tells it too."""
    contest = Contest(peer_network(), parse_threat(SOME_SURVIVE), images[:2])
    (gate, fast), (standard, slow) = (
        stopwatch(partial(contest.whole_apgd, mode, images, labels)) for mode in ("gate", "standard")
    )
    told = {"images": len(images), "withstood": int((~standard).sum()), "threat": SOME_SURVIVE}
    told |= {"missed": int((standard & ~gate).sum()), "more": int((gate & ~standard).sum())}
    case, times = f"gate-agreement, {SOME_SURVIVE}, apgd-ce", ([bench.seconds(slow)], [bench.seconds(fast)])
    bench.row(case, "ours, standard", *times, "s", torch.equal(gate, standard), **told)
    first = bench.arguments.verdicts
    last = min(first + bench.arguments.agree, len(images))
    for text, rows in ((MOST_BREAK, range(len(images))), (SOME_SURVIVE, range(first, last))):
        contest, missed, more = Contest(peer_network(), parse_threat(text), images[:2]), 0, 0
        broken: dict[str, list[bool]] = {"gate": [], "standard": []}
        taken = dict.fromkeys(broken, 0.0)
        for start in range(rows.start, rows.stop, bench.arguments.batch):
            part = slice(start, min(start + bench.arguments.batch, rows.stop))
            for mode, verdicts in broken.items():
                found, spent = stopwatch(partial(contest.whole_run, mode, images[part], labels[part]))
                verdicts.extend(_broken(found))
                taken[mode] += bench.seconds(spent)
            pairs = list(zip(broken["gate"], broken["standard"], strict=True))
            missed, more = pairs.count((False, True)), pairs.count((True, False))
            print(f"{text}: {len(pairs) - missed - more} of {len(pairs)} verdicts agree …", flush=True)
        told = {"images": len(rows), "withstood": broken["standard"].count(False), "missed": missed, "more": more}
        case, times = f"gate-agreement, {text}", ([taken["standard"]], [taken["gate"]])
        bench.row(case, "ours, standard", *times, "s", missed + more == 0, **told, threat=text)


def _broken(verdicts: dict[str, list[bool]]) -> list[bool]:
    return [any(hits) for hits in zip(*verdicts.values(), strict=True)]


# ---- randomized smoothing


def run_smoothing(bench: Bench) -> None:
    """Votes per second, on the same noise."""
    votes, image, _ = _votes(bench)
    who = ["plain"] if bench.checkout is None else ["peer", "peer-64", "plain"]
    if bench.checkout is None:
        bench.skip("smoothing", SMOOTHING, "no checkout $PROXYROB_PEERS/smoothing")
    n = bench.arguments.samples
    found: dict[str, list[float]] = {name: [] for name in [*who, "fp32", "bf16"]}
    counts: dict[str, list[list[int]]] = {name: [] for name in found}
    for name in found:
        votes.count(name, image[0], 64, 0)  # the first reading rearranges weights
    for number in range(bench.rounds):
        print(f"smoothing: round {number + 1} of {bench.rounds} …", flush=True)
        for name, values in found.items():
            counted, taken = stopwatch(partial(votes.count, name, image[number], n, number))
            counts[name].append(counted)
            values.append(n / bench.seconds(taken))
    names = {"peer": SMOOTHING, "peer-64": f"{SMOOTHING}, batches of 64", "plain": "plain"}
    for short in ("fp32", "bf16"):
        for name in who:
            moved = sum(
                sum(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in zip(counts[short], counts[name], strict=True)
            )
            told = {"votes": n * bench.rounds, "votes_moved": moved // 2}
            equal = counts[short] == counts[name]
            bench.row(f"smoothing-{short}", names[name], found[name], found[short], "samples/s", equal, **told)


def run_certify_radius(bench: Bench) -> None:
    """Seconds per image to know whether it is certified at a radius.

    The samples that takes depend on the network, so they are not measured but computed, for the shares of votes that the
    images of the authors' published log had; what is measured is how fast samples are drawn, by sequential certification.
    """
    if bench.checkout is None:
        bench.skip("certify-radius", SMOOTHING, "no checkout $PROXYROB_PEERS/smoothing")
        return
    votes, images, _ = _votes(bench)
    config, shares = CertifyConfig(method=SequentialMethod()), published_shares(bench.checkout)
    method = config.method
    assert isinstance(method, SequentialMethod)
    for radius in RADII[:1] if bench.arguments.quick else RADII:
        design = design_looks(
            (radius,),
            sigma=SIGMA,
            n=config.n,
            alpha=config.alpha,
            looks=method.looks,
            early_share=method.early_share,
            futility=method.futility,
        )
        distinct = {
            share: (*follow(design, share), fixed_share(design, config.n, config.alpha, share)) for share in set(shares)
        }
        certified, samples, fixed = (sum(distinct[share][k] for share in shares) / len(shares) for k in range(3))
        false = follow(design, float(torch.special.ndtr(torch.tensor(radius / SIGMA, dtype=torch.float64))))[0]
        told = {"certified": certified, "certified_by_fixed_n": fixed, "false_certificate": false, "alpha": config.alpha}
        told |= {"samples_per_image": config.n0 + samples, "fixed_samples_per_image": config.n0 + config.n}
        equal = abs(certified - fixed) <= 0.001 and false <= config.alpha
        theirs, ours = [], {"fp32": [], "bf16": []}
        for number in range(bench.rounds):
            print(f"certify-radius {radius}: round {number + 1} of {bench.rounds} …", flush=True)
            _, taken = stopwatch(partial(votes.count, "peer", images[0], bench.arguments.samples, number))
            theirs.append((config.n0 + config.n) * bench.seconds(taken) / bench.arguments.samples)
            for short, values in ours.items():
                drawn, taken = stopwatch(partial(votes.certify, short, images[:CERTIFIED_AT_ONCE], design, 1000 * number))
                values.append((config.n0 + samples) * bench.seconds(taken) / drawn)
        for short, values in ours.items():
            bench.row(f"certify-radius-{short}, {radius}", SMOOTHING, theirs, values, "s/image", equal, **told)


def _votes(bench: Bench) -> tuple[Votes, Tensor, Tensor | None]:
    """The votes of one network, and the images that it votes on."""
    found = bench.images(16)
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) if found is None else found[0]
    peer = None if bench.checkout is None else load_peer(bench.checkout)
    return Votes(peer_network(), images[:2], peer), images, None if found is None else found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and samples, one radius, and no whole runs")
    parser.add_argument("--threads", type=int, default=1, help="cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, help="images that APGD attacks in a round (default: 24)")
    parser.add_argument("--batch", type=int, help="images of which those that withstand APGD are one batch (default: 56)")
    parser.add_argument("--verdicts", type=int, default=12, help="images of the whole runs")
    parser.add_argument("--agree", type=int, default=32, help="images at 1/255 whose verdicts in mode gate are looked at")
    parser.add_argument("--samples", type=int, help="noisy copies of an image (default: 1000)")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all; with --quick neither verdicts nor agreement")
    parser.add_argument("--cifar", type=Path, help="folder with CIFAR-10 as parquet")
    parser.add_argument("--cifar-file", default="test*.parquet", help="name or pattern of images in it that lost nothing")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    arguments.images = arguments.images or (8 if arguments.quick else 24)
    arguments.batch = arguments.batch or (24 if arguments.quick else 56)
    arguments.samples = arguments.samples or (500 if arguments.quick else 1000)
    left_out = ("verdicts", "agreement") if arguments.quick else ()
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    print(f"{platform.processor() or platform.machine()}, cores {cores}, load {os.getloadavg()[0]:.1f}")
    print(f"{'case':<26} {'peer':<22} {'peer':>10} {'ours':>10} {'unit':<10} {'ratio':>8}")
    for case in arguments.cases or [case for case in CASES if case not in left_out]:
        run_case(bench, case)
        if arguments.json:  # what an interrupted run has found is kept
            arguments.json.write_text(json.dumps(bench.rows, indent=1) + "\n")


def run_case(bench: Bench, case: str) -> None:
    """One of the cases, or the reason why not."""
    without_images: dict[str, Callable[[Bench], None]] = {"smoothing": run_smoothing, "certify-radius": run_certify_radius}
    with_images: dict[str, Callable[[Bench, Tensor, Tensor], None]] = {
        "some-survive": run_some_survive,
        "most-break": run_most_break,
        "verdicts": run_verdicts,
        "agreement": run_agreement,
    }
    if case in without_images:
        without_images[case](bench)
    elif (found := bench.images(NUM_AGREEMENT if case == "agreement" else bench.arguments.batch)) is None:
        bench.skip(case, PEER, "attacks need real images: give a folder with CIFAR-10 with --cifar")
    else:
        with_images[case](bench, *found)


if __name__ == "__main__":
    main()
