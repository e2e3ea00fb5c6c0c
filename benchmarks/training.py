"""How long does a step of adversarial training take? Ours, and those of others, on the same images and network.

    .venv/bin/python benchmarks/training.py --json training.json                # an hour on one core
    .venv/bin/python benchmarks/training.py --quick                             # small batches: eight minutes on one core
    .venv/bin/python benchmarks/training.py --cases bf16-quality --cifar FOLDER # 25 minutes on one core

Every measurement is a process of its own, pinned to ``--threads`` cores, and the trainers take turns: A B A B … The medians
over rounds are printed with their ratio, which is above 1 where ours is ahead. Seconds are those of the clock, or, where more
programs want to run than there are cores, the processor's own (``clock`` of a row says which; with several threads it is always
the clock). ``equal`` says that ours gives the loss that the textbook gives, to rounding, which ten steps of an attack amplify.

torchattacks asks for older versions of requests and urllib3 than ours; it gets a folder of its own (in the user's cache
folder, made by uv when first needed). The other peers are checkouts in the folder that ``PROXYROB_PEERS`` names:
proxy-distributions (the paper's), DM-Improves-AT and robustness (MadryLab's).
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import platformdirs

from benchmarks.loops import COMPARED_STEPS
from benchmarks.steps import TOLERANCE
from proxyrob.config.train import TrainConfig

ROOT = Path(__file__).parents[1]  # where children find the benchmarks
TORCHATTACKS = "torchattacks==3.5.1"
CHECKOUTS = {"paper": "proxy-distributions", "DM-Improves-AT": "DM-Improves-AT", "robustness": "robustness"}
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}

PEERS = {
    "pgd10": ["paper", "DM-Improves-AT", "robustness", "torchattacks", "plain"],
    "trades": ["paper", "DM-Improves-AT", "plain"],
}
OVERHEAD, TINY, QUALITY = "overhead", "tiny", "bf16-quality"
CASES = (*PEERS, TINY, OVERHEAD, QUALITY)
WAYS = {
    "plain float32": {"path": "plain", "precision": "float32"},
    "fast float32": {"path": "fast", "precision": "float32"},
    "fast bfloat16": {"path": "fast", "precision": "bfloat16"},
}
QUALITY_SEEDS = 3
STUDENT = 4.303
"""Half the width of a 95 % interval of a mean of three, in standard errors (Student's t with two degrees of freedom)."""

Row = dict[str, Any]


class Bench:
    """What the cases share: cores, sizes, the folder, and the rows found so far."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.rounds, self.batch, self.threads = arguments.rounds, arguments.batch, arguments.threads
        self.cores = sorted(os.sched_getaffinity(0))[: self.threads]
        self.checkouts = Path(os.environ["PROXYROB_PEERS"]) if "PROXYROB_PEERS" in os.environ else None
        self.rows: list[Row] = []

    # ---- processes

    def child(self, script: str, **task: Any) -> dict[str, Any]:
        """Run a script of this folder to its end and return what it prints, with the load of the machine by then."""
        task = {"cores": self.cores, "threads": self.threads, "folder": str(self.folder), **task}
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(ROOT / "benchmarks" / script), json.dumps(task)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{task} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1]) | {"load": os.getloadavg()[0]}

    def available(self, case: str, peers: list[str]) -> dict[str, dict[str, str]]:
        """The peers that are here, each with where it lies; a row for each of the others."""
        found: dict[str, dict[str, str]] = {}
        for peer in peers:
            if peer in CHECKOUTS:
                place = self.checkouts / CHECKOUTS[peer] if self.checkouts else None
                if place is None or not place.is_dir():
                    self.skip(case, peer, f"no checkout $PROXYROB_PEERS/{CHECKOUTS[peer]}")
                    continue
                found[peer] = {"checkout": str(place)}
            else:
                found[peer] = {"torchattacks": str(torchattacks_folder())} if peer == "torchattacks" else {}
        return found

    # ---- rows

    def row(self, case: str, peer: str, theirs: list[Row], ours: list[Row], unit: str, equal: bool | None, **more: Any) -> None:
        """Add and print a row of seconds (``wall_s``, ``cpu_s``), or of images per second where they are of ``images``."""
        load = median(one["load"] for one in theirs + ours)
        clock = "cpu" if self.threads == 1 and load > len(os.sched_getaffinity(0)) else "wall"
        peers, own = ([one[f"{clock}_s"] for one in found] for found in (theirs, ours))
        pairs = [a / b for a, b in zip(peers, own, strict=True)]
        images = more.pop("images", None)
        peer_value, value = (images / median(found) if images else median(found) for found in (peers, own))
        row = {"case": case, "peer": peer, "peer_value": peer_value, "value": value, "unit": unit}
        row |= {"ratio": median(peers) / median(own), "ratio_low": min(pairs), "ratio_high": max(pairs)}
        row |= {"rounds": len(ours), "equal": equal, "clock": clock, "load": round(load, 1), **more}
        self.add(row)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        verdict = {True: "equal", False: "NOT EQUAL", None: ""}[row["equal"]]
        figures = f"{row['peer_value']:>10.4f} {row['value']:>10.4f} {row['unit']:<9} {row['ratio']:>8.2f}x"
        print(f"{row['case']:<20} {row['peer']:<20} {figures}  {verdict}", flush=True)

    def skip(self, case: str, peer: str, reason: str) -> None:
        self.rows.append({"case": case, "peer": peer, "skipped": reason})
        print(f"{case:<20} {peer:<20} skipped: {reason}", flush=True)


def torchattacks_folder() -> Path:
    """Where torchattacks lies, without what it depends on, which is here; it is fetched when it is not there."""
    folder = platformdirs.user_cache_path("proxyrob") / "peers" / TORCHATTACKS.replace("==", "-")
    if not (folder / "installed").is_file():
        uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
        if uv is None:
            raise FileNotFoundError(f"{TORCHATTACKS} needs uv to install it: pip install uv")
        print(f"installing {TORCHATTACKS} into {folder} …", flush=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", "--target", str(folder), TORCHATTACKS], check=True)
        (folder / "installed").touch()
    return folder


# ---- cases


def compare(bench: Bench, case: str, objective: str, network: str, peers: list[str], precisions: dict[str, str]) -> None:
    """One step of ours, in each of the precisions, against one of each peer."""
    places = bench.available(case, peers)
    tiny = network == "digits"
    sizes = {"batch": 128, "first": 10, "steps": 100} if tiny else {"batch": bench.batch, "first": 1, "steps": 2}
    tasks = {name: {"trainer": "ours", "precision": precision} for name, precision in precisions.items()}
    tasks |= {peer: {"trainer": peer, **place} for peer, place in places.items()}
    found: dict[str, list[Row]] = {name: [] for name in tasks}
    for number in range(bench.rounds):
        print(f"{case}: round {number + 1} of {bench.rounds} …", flush=True)
        for name, task in tasks.items():
            found[name].append(bench.child("trainers.py", objective=objective, network=network, **sizes, **task))
    losses = {name: results[0]["loss"] for name, results in found.items()}
    for name, precision in precisions.items():
        difference = abs(losses[name] / losses["plain"] - 1.0)
        equal, batch = difference <= TOLERANCE[precision], sizes["batch"]
        for peer in places:
            told = {"loss": losses[name], "plain_loss": losses["plain"], "peer_loss": losses[peer]}
            told |= {"batch": batch, "shims": found[peer][0]["shims"]}
            bench.row(name, peer, found[peer], found[name], "images/s", equal, images=batch, **told)


def run_steps(bench: Bench, case: str) -> None:
    """A case of ResNet-18."""
    precisions = {f"{case}-{short}": precision for short, precision in PRECISIONS.items()}
    compare(bench, case, case.removesuffix("10"), "resnet-18", PEERS[case], precisions)


def run_tiny(bench: Bench) -> None:
    compare(bench, TINY, "pgd", "digits", ["torchattacks", "plain"], {TINY: "float32"})


def run_overhead(bench: Bench) -> None:
    """Whole trainings against their steps alone, with a checkpoint as often as the default has it."""
    sizes: dict[str, Row] = {
        "digits": {"batch": 128, "precision": "float32", "steps": 300, "alone": 100, "checkpoint_every": 100}
    }
    if not bench.arguments.quick:
        sizes["resnet-18"] = {"batch": 16, "precision": "bfloat16", "steps": 60, "alone": 15, "checkpoint_every": 20}
    usual = TrainConfig().checkpoint_every
    for network, size in sizes.items():
        alone, loop = [], []
        for number in range(bench.rounds):
            print(f"{OVERHEAD}, {network}: round {number + 1} of {bench.rounds} …", flush=True)
            found = bench.child("loops.py", loop="overhead", network=network, first=5, **size)
            clocks = {clock: found[clock] for clock in ("wall_s", "cpu_s")}
            alone.append({clock: each["alone"] for clock, each in clocks.items()} | {"load": found["load"]})
            whole = {clock: each["loop"] + each["checkpoint"] / usual for clock, each in clocks.items()}
            loop.append(whole | {"load": found["load"], "checkpoint_s": found["cpu_s"]["checkpoint"]})
        told = {"batch": size["batch"], "checkpoint_cpu_s": median(one["checkpoint_s"] for one in loop)}
        bench.row(f"{OVERHEAD}, {network}", "the step alone", alone, loop, "s/step", None, **told)


def run_quality(bench: Bench) -> None:
    """Robust accuracy of networks trained on either path and in either precision, over seeds."""
    folder = bench.arguments.cifar
    if folder is None:
        bench.skip(QUALITY, "plain float32", "no CIFAR-10: give its folder with --cifar")
        return
    found: dict[str, list[Row]] = {way: [] for way in WAYS}
    files = {"train_file": bench.arguments.cifar_train, "test_file": bench.arguments.cifar_test}
    task = {"cifar": str(folder), **files, "steps": bench.arguments.quality_steps, "batch": 64}
    for seed in range(QUALITY_SEEDS):
        print(f"{QUALITY}: seed {seed} …", flush=True)
        for way, choice in WAYS.items():
            found[way].append(bench.child("loops.py", loop="quality", seed=seed, **task, **choice))
    for first, second in (
        ("plain float32", "fast float32"),
        ("plain float32", "fast bfloat16"),
        ("fast float32", "fast bfloat16"),
    ):
        theirs, ours = found[first], found[second]
        for figure in ("robust", "clean"):
            a, b = ([one[figure] for one in results] for results in (theirs, ours))
            mean, low, high = _interval([y - x for x, y in zip(a, b, strict=True)])
            row: Row = {"case": f"{QUALITY}, {figure}", "peer": f"{first} | {second}", "unit": "accuracy"}
            row |= {"peer_value": sum(a) / len(a), "value": sum(b) / len(b), "ratio": sum(b) / sum(a)}
            row |= {"peer_sd": _deviation(a), "sd": _deviation(b), "difference": mean, "low": low, "high": high}
            row |= {"peer_values": a, "values": b, "rounds": len(a), "equal": abs(mean) <= max(_deviation(a), _deviation(b))}
            row |= {"cpu_s": [one["cpu_s"] for one in ours], "peer_cpu_s": [one["cpu_s"] for one in theirs]}
            bench.add(row)
        bench.add(_compare_losses(first, second, theirs, ours))


def _compare_losses(first: str, second: str, theirs: list[Row], ours: list[Row]) -> Row:
    """How far the losses of the first steps are apart, in the seed where they are farthest."""
    pairs = [(a, b) for x, y in zip(theirs, ours, strict=True) for a, b in zip(x["losses"], y["losses"], strict=True)]
    farthest = max(pairs, key=lambda pair: abs(pair[1] / pair[0] - 1.0))
    row: Row = {"case": f"{QUALITY}, losses", "peer": first, "ours": second, "unit": "loss", "rounds": len(ours)}
    row |= {"peer_value": farthest[0], "value": farthest[1], "ratio": farthest[1] / farthest[0], "steps": COMPARED_STEPS}
    row |= {"peer_values": [one["losses"] for one in theirs], "values": [one["losses"] for one in ours]}
    precision = WAYS[second]["precision"]
    return row | {"equal": abs(row["ratio"] - 1.0) <= TOLERANCE[precision]}


def _deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5


def _interval(values: list[float]) -> tuple[float, float, float]:
    mean, half = sum(values) / len(values), STUDENT * _deviation(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batches of 16, and no trained networks to compare")
    parser.add_argument("--threads", type=int, default=1, help="cores of each trainer")
    parser.add_argument("--batch", type=int, help="images of a step of ResNet-18 (default: 64)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all, without bf16-quality where it is --quick")
    parser.add_argument("--cifar", type=Path, help="folder with CIFAR-10 as parquet, for bf16-quality")
    parser.add_argument("--cifar-train", default="train*.parquet", help="name or pattern of the training images' files in it")
    parser.add_argument("--cifar-test", default="test*.parquet", help="likewise of the test images, which are not looked at")
    parser.add_argument("--quality-steps", type=int, default=400, help="steps of each network of bf16-quality")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or (16 if arguments.quick else 64)
    cases = arguments.cases or [case for case in CASES if case != QUALITY or not arguments.quick]
    with tempfile.TemporaryDirectory(prefix="proxyrob-training-") as name:
        bench = Bench(arguments, Path(name))
        print(f"{platform.processor() or platform.machine()}, cores {bench.cores}, load {os.getloadavg()[0]:.1f}")
        print(f"{'case':<20} {'peer':<20} {'peer':>10} {'ours':>10} {'unit':<9} {'ratio':>9}")
        for case in cases:
            special = {OVERHEAD: run_overhead, TINY: run_tiny, QUALITY: run_quality}.get(case)
            special(bench) if special else run_steps(bench, case)
            if arguments.json:  # what an interrupted run has found is kept
                arguments.json.write_text(json.dumps(bench.rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
