"""What does a GPU make of the work? Training steps, attacks, certificates and samples, and the card's own rate.

    python benchmarks/gpu.py --json gpu.json                  # on a CUDA GPU: under ten minutes
    python benchmarks/gpu.py --quick --device cpu             # the same in small, on one core: about four minutes

The library alone is needed, without Prefect and MLflow. Ours and the peer take turns, A B A B …, in this process; the medians
over rounds are printed with their ratio, which is above 1 where ours is ahead. ``plain`` is the textbook's step in plain
PyTorch; in bfloat16 it runs under ``torch.autocast``. ``share`` is what the arithmetic of the textbook's step amounts to
of the matrix rate that is measured here in the same precision. ``equal`` says that ours gives the textbook's loss, to
rounding, or its votes.

A case that would begin after ``--limit`` seconds is reported as skipped; what was found until then is kept in the file.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs where the library is not installed

from benchmarks.steps import ATTACK_STEPS, TOLERANCE, Bench, Take, images_of, labels_of, ours, plain
from proxyrob.certify.votes import count_votes
from proxyrob.config import DiffusionProxy
from proxyrob.evaluate.ensemble import STANDARD_ATTACKS, Ensemble
from proxyrob.models import FoldedCopy
from proxyrob.proxy import fit_diffusion
from proxyrob.proxy.diffusion import DiffusionSampler
from proxyrob.source import Split
from proxyrob.threat import parse_threat
from tests.toys import stage_in, write_source

SHAPE = (3, 32, 32)
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
BATCHES = {"resnet-18": 512, "wide-resnet-28-10": 256, "wide-resnet-34-10": 256}
QUICK_BATCHES = {"resnet-18": 8}
READINGS = 2 * ATTACK_STEPS + 3
"""Forward passes that a PGD step is worth: the gradient of images costs as much again, that of weights, too, twice as much."""

SIGMA = 0.25
UNBREAKABLE = parse_threat("linf:1/25500")
"""So small that nothing is broken: every attack runs to its end on every image."""

Row = dict[str, Any]


class Runner:
    """The device, the sizes, the time that is left, and the rows found so far."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.device, self.quick, self.rounds = torch.device(arguments.device), arguments.quick, arguments.rounds
        self.folder, self.json, self.deadline = folder, arguments.json, time.perf_counter() + arguments.limit
        self.rates: dict[str, float] = {}
        self.rows: list[Row] = []

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """How long ``work`` takes, to the end of what it gave the device to do."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def alternate(self, peer: Callable[[], object], own: Callable[[], object]) -> tuple[list[float], list[float]]:
        """Seconds of either in each round; the first of each, which warms up, is not counted."""
        for warming in (peer, own):
            warming()
        found = [(self.seconds(peer), self.seconds(own)) for _ in range(self.rounds)]
        return [theirs for theirs, _ in found], [ours for _, ours in found]

    def compare(
        self,
        case: str,
        peer: str,
        times: tuple[list[float], list[float]],
        amount: float,
        unit: str,
        equal: bool | None,
        **more: Any,
    ) -> None:
        """A row of ``amount`` things in each of two lists of seconds."""
        theirs, own = times
        pairs = [a / b for a, b in zip(theirs, own, strict=True)]
        row = {"case": case, "peer": peer, "peer_value": amount / median(theirs), "value": amount / median(own), "unit": unit}
        row |= {"ratio": median(theirs) / median(own), "ratio_low": min(pairs), "ratio_high": max(pairs)}
        self.add(row | {"rounds": len(own), "equal": equal, **more})

    def add(self, row: Row) -> None:
        self.rows.append(row | describe(self.device))
        if "skipped" in row:
            print(f"{row['case']:<32} skipped: {row['skipped']}", flush=True)
        else:
            peers = f"{row['peer_value']:>12.1f}" if row["peer_value"] is not None else " " * 12
            ratio = f"{row['ratio']:>7.2f}x" if row["ratio"] is not None else ""
            share = f"  {row['share']:.0%} of the matrix rate" if "share" in row else ""
            print(
                f"{row['case']:<32} {row['peer']:<14} {peers} {row['value']:>12.1f} {row['unit']:<12} {ratio}{share}",
                flush=True,
            )
        if self.json:
            self.json.write_text(json.dumps(self.rows, indent=1) + "\n")

    def run(self, case: str, measure: Callable[[], None]) -> None:
        """Measure, unless the time is up; a case that fails, for want of memory say, does not end the others."""
        if time.perf_counter() > self.deadline:
            self.add({"case": case, "skipped": "out of time"})
            return
        try:
            measure()
        except torch.OutOfMemoryError as error:
            self.add({"case": case, "skipped": str(error).splitlines()[0]})
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def describe(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    return {"device": name, "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]), **versions}


# ---- cases


def measure_rate(runner: Runner, precision: str) -> None:
    """The rate of a large product of matrices, to which shares refer."""
    size, repeats = (1024, 3) if runner.quick else (8192, 20)
    a, b = (torch.randn((size, size), device=runner.device, dtype=getattr(torch, PRECISIONS[precision])) for _ in range(2))
    product = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(repeats):
            torch.matmul(a, b, out=product)

    multiply()
    rate = 2 * size**3 * repeats / median(runner.seconds(multiply) for _ in range(runner.rounds))
    runner.rates[precision] = rate
    row = {
        "case": f"matmul-{precision}",
        "peer": "",
        "peer_value": None,
        "value": rate / 1e9,
        "unit": "GFLOP/s",
        "ratio": None,
    }
    runner.add(row | {"rounds": runner.rounds, "equal": None, "size": size})


def measure_step(runner: Runner, name: str, precision: str, batch: int) -> None:
    """A PGD-10 step: images per second of ours and of the textbook's, from the same weights."""
    task = {"objective": "pgd", "network": name, "batch": batch, "precision": PRECISIONS[precision]}
    images, labels = images_of(batch, SHAPE, seed=1).to(runner.device), labels_of(batch).to(runner.device)

    def prepare(trainer: Callable[[Bench], Take]) -> Callable[[], float]:
        take = trainer(Bench(task, runner.device))

        def step() -> float:
            torch.manual_seed(0)
            with torch.autocast(runner.device.type, torch.bfloat16, enabled=precision == "bf16" and trainer is plain):
                return take(images, labels)

        return step

    network = Bench(task, runner.device).network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    flops = READINGS * counter.get_total_flops()
    loss, own_loss = prepare(plain)(), prepare(ours)()
    times = runner.alternate(prepare(plain), prepare(ours))
    told = {"batch": batch, "loss": own_loss, "plain_loss": loss, "gflop_of_an_image": flops / batch / 1e9}
    share = flops / median(times[1]) / runner.rates[precision]
    equal = abs(own_loss / loss - 1.0) <= TOLERANCE[PRECISIONS[precision]]
    runner.compare(f"pgd{ATTACK_STEPS}-{precision}, {name}", "plain", times, batch, "images/s", equal, share=share, **told)


def measure_autoattack(runner: Runner, mode: str) -> None:
    """AutoAttack on images that withstand all of it: images per second of each attack and per minute of all four.

    In small, of the first alone: the four take a processor two minutes for every image.
    """
    count = 2 if runner.quick else 256
    bench = Bench({"objective": "pgd", "network": "resnet-18"}, runner.device)
    model = bench.network.eval()
    images = images_of(count, SHAPE, seed=1).to(runner.device)
    with torch.no_grad():
        labels = model(images).argmax(1)
    ensemble = Ensemble(10, mode)  # pyright: ignore[reportArgumentType]  (one of its two modes)
    search = FoldedCopy(model, ensemble.precision, example=images[:2])

    def confirm(found: Tensor, own: Tensor) -> Tensor:
        with torch.no_grad():
            return model(found).argmax(1) != own

    total, broken = 0.0, 0
    for attack in STANDARD_ATTACKS if not runner.quick else STANDARD_ATTACKS[:1]:
        outcome: list[int] = []

        def attack_all(attack: str = attack, outcome: list[int] = outcome) -> None:
            found = ensemble.attack(attack, search, images, labels, UNBREAKABLE, seed=0, confirm=confirm)
            outcome.append(int(found.broken.sum()))

        seconds = runner.seconds(attack_all)
        total, broken = total + seconds, broken + outcome[0]
        row = {"case": f"autoattack-{mode}, {attack}", "peer": "", "peer_value": None, "value": count / seconds, "ratio": None}
        runner.add(row | {"unit": "images/s", "rounds": 1, "equal": None, "images": count, "broken": outcome[0]})
    if runner.quick:
        return
    row = {"case": f"autoattack-{mode}, all", "peer": "", "peer_value": None, "value": 60 * count / total, "ratio": None}
    runner.add(row | {"unit": "images/min", "rounds": 1, "equal": None, "images": count, "broken": broken})


def measure_smoothing(runner: Runner, precision: str) -> None:
    """Noisy copies classified per second, by the folded copy and by the network as it is."""
    n, batch_size = (64, 32) if runner.quick else (20_000, 1000)
    model = Bench({"objective": "pgd", "network": "resnet-18"}, runner.device).network.eval()
    image = images_of(2, SHAPE, seed=1).to(runner.device)
    folded = FoldedCopy(model, getattr(torch, PRECISIONS[precision]), example=image)

    def votes(network: nn.Module) -> Tensor:
        return count_votes(network, image[0], SIGMA, n, batch_size, torch.Generator(runner.device).manual_seed(0))

    different = int((votes(model) - votes(folded)).abs().sum()) // 2
    times = runner.alternate(lambda: votes(model), lambda: votes(folded))
    equal = different == 0 if precision == "fp32" else None
    runner.compare(f"smoothing-{precision}, resnet-18", "plain", times, n, "samples/s", equal, different_votes=different)


def measure_sampling(runner: Runner) -> None:
    """Images of the diffusion proxy per second, at the sizes of the digits."""
    count, classes = 20 if runner.quick else 20_000, 10
    config = DiffusionProxy(steps=2, batch_size=16)
    source, proxy = stage_in(runner.folder, "source"), stage_in(runner.folder, "proxy")
    write_source(source, Split(np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8), np.arange(40) % classes))
    fit_diffusion(config, source=source, seed=0, stage=proxy, device=str(runner.device))
    sampler = DiffusionSampler(config, source=source, proxy=proxy, seed=0, device=str(runner.device))
    sampler.sample(np.arange(10))
    seconds = median(runner.seconds(lambda: sampler.sample(np.arange(count))) for _ in range(runner.rounds))
    row = {"case": "sampling, 8x8 diffusion", "peer": "", "peer_value": None, "value": count / seconds, "unit": "images/s"}
    runner.add(row | {"ratio": None, "rounds": runner.rounds, "equal": None, "sampler_steps": config.sampler_steps})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, ResNet-18 alone")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=480.0, help="seconds after which no further case begins")
    parser.add_argument("--json", type=Path, help="write what is found here")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --quick --device cpu measures the same in small")
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory(prefix="proxyrob-gpu-") as name:
        runner = Runner(arguments, Path(name))
        print(json.dumps(describe(runner.device)), f"load {os.getloadavg()[0]:.1f}", flush=True)
        print(f"{'case':<32} {'peer':<14} {'peer':>12} {'ours':>12} {'unit':<12} {'ratio':>8}", flush=True)
        for precision in PRECISIONS:
            runner.run(f"matmul-{precision}", lambda p=precision: measure_rate(runner, p))
        for network, batch in (QUICK_BATCHES if runner.quick else BATCHES).items():
            for precision in reversed(PRECISIONS):
                runner.run(
                    f"pgd{ATTACK_STEPS}-{precision}, {network}",
                    lambda n=network, p=precision, b=batch: measure_step(runner, n, p, b),
                )
        for precision in PRECISIONS:
            runner.run(f"smoothing-{precision}, resnet-18", lambda p=precision: measure_smoothing(runner, p))
        runner.run("sampling, 8x8 diffusion", lambda: measure_sampling(runner))
        for mode in ("standard", "gate"):
            runner.run(f"autoattack-{mode}", lambda m=mode: measure_autoattack(runner, m))


if __name__ == "__main__":
    main()
