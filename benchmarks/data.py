"""How fast are images read? Ours, and the readers that others use, on the same images of the same disk.

    .venv/bin/python benchmarks/data.py --json data.json            # half an hour on one core, 20 GB of disk
    .venv/bin/python benchmarks/data.py --large --json data.json    # and ten million images: 35 GB at a time
    .venv/bin/python benchmarks/data.py --quick                     # eight minutes on one core, 3 GB

Every measurement is a process of its own, pinned to ``--threads`` cores, and the readers take turns: A B A B … The medians
over rounds are printed with their ratio, which is above 1 where ours is ahead. ``equal`` says that both gave every image
exactly once per epoch, each with its label, and raw images byte for byte. Everything is written into a temporary folder
below ``--folder`` and deleted at the end, also after an error or Ctrl-C.

mosaicml-streaming asks for older versions of numpy and huggingface-hub than ours; it gets an environment of its own
(in the user's cache folder, made by uv when first needed). The paper's own reader is measured where ``PROXYROB_PEERS`` names a
folder with a checkout of proxy-distributions.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import platformdirs

from benchmarks.readers import AUGMENTED, BATCH, RAW, S3_COLD

ROOT = Path(__file__).parents[1]  # where children find the benchmarks
MOSAICML = "mosaicml-streaming==0.13.0"
PAPER = "proxy-distributions"
CHECKED_IMAGES = 20_000  # of every reader's whole epoch that is looked at
LARGE = 10
"""How many times as many images the large set has."""

FORMATS = {
    "ours": "shards",
    "plain": "flat",
    "paper": "flat",
    "npz": "npz",
    "npz-sliced": "npz",
    "mosaicml-streaming": "mds",
    "webdataset": "tar",
}
FAST = {"ours", "npz-sliced"}
"""They read a whole epoch in each round, the others part of one."""

Row = dict[str, Any]


class Bench:
    """What the cases share: cores, sizes, the folder, and the rows found so far."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.folder, self.rounds, self.images = folder, arguments.rounds, arguments.images
        self.part = min(self.images, arguments.batches * BATCH)
        available = sorted(os.sched_getaffinity(0))
        self.cores = available[: arguments.threads]
        self.other_cores = available[arguments.threads :] or available
        self.threads = arguments.threads
        self.checkout = Path(os.environ["PROXYROB_PEERS"]) / PAPER if "PROXYROB_PEERS" in os.environ else None
        self.rows: list[Row] = []

    # ---- processes

    def child(self, python: str | Path = sys.executable, **task: Any) -> dict[str, Any]:
        """Run ``benchmarks/readers.py`` to its end and return what it prints."""
        task = {"cores": self.cores, "threads": self.threads, **task}
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        command = [str(python), str(ROOT / "benchmarks" / "readers.py"), json.dumps(task)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{task} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    def write(self, folder: Path, formats: set[str], images: int) -> None:
        """The same images in each of the formats."""
        for name in sorted(formats):
            print(f"writing {images:,} images as {name} …", flush=True)
            (folder / name).mkdir(parents=True)
            python = mosaicml_python() if name == "mds" else sys.executable
            self.child(python, write=name, place=str(folder / name), images=images, cores=self.cores + self.other_cores)

    def read(self, reader: str, case: str, folder: Path, images: int, *, check: bool = False) -> dict[str, Any]:
        python = mosaicml_python() if reader == "mosaicml-streaming" else sys.executable
        place = str(folder / FORMATS[reader])
        task = {"reader": reader, "case": case, "place": place, "images": images, "check": check}
        return self.child(python, **task, **({"checkout": str(self.checkout)} if reader == "paper" else {}))

    # ---- rows

    def row(
        self, case: str, peer: str, peers: list[float], ours: list[float], unit: str, equal: bool | None, **more: Any
    ) -> None:
        """Add and print a row; ``unit`` says which way is ahead."""
        peer_value, value = median(peers), median(ours)
        ratio = value / peer_value if unit.endswith("/s") else peer_value / value
        found = {"case": case, "peer": peer, "peer_value": peer_value, "value": value, "unit": unit, "ratio": ratio}
        self.rows.append(found | {"rounds": len(ours), "equal": equal, "load": round(os.getloadavg()[0], 1), **more})
        verdict = {True: "equal", False: "NOT EQUAL", None: ""}[equal]
        print(f"{case:<20} {peer:<28} {peer_value:>12,.3f} {value:>12,.3f} {unit:<9} {ratio:>8.2f}x  {verdict}", flush=True)

    def skip(self, case: str, peer: str, reason: str) -> None:
        self.rows.append({"case": case, "peer": peer, "skipped": reason})
        print(f"{case:<20} {peer:<28} skipped: {reason}", flush=True)


def mosaicml_python() -> Path:
    """The interpreter of mosaicml-streaming's own environment, which is made when it is not there."""
    folder = platformdirs.user_cache_path("proxyrob") / "peers" / MOSAICML.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
        if uv is None:
            raise FileNotFoundError(f"{MOSAICML} needs uv to install it: pip install uv")
        print(f"installing {MOSAICML} into {folder} …", flush=True)
        same = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision")]
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), MOSAICML, *same], check=True)
        (folder / "installed").touch()
    return python


# ---- cases


def run_local(bench: Bench, peers: dict[str, list[str]]) -> None:
    """The cases that read from a local disk, each against its peers."""
    readers = {"ours"} | {peer for names in peers.values() for peer in names}
    formats = {FORMATS[reader] for reader in readers}
    bench.write(bench.folder / "checked", formats, CHECKED_IMAGES)
    bench.write(bench.folder / "local", formats, bench.images)
    for case, names in peers.items():
        print(f"{case}: looking at an epoch of every reader …", flush=True)
        whole = {
            name: bench.read(name, case, bench.folder / "checked", CHECKED_IMAGES, check=True) for name in ["ours", *names]
        }
        whole["ours of all"] = bench.read("ours", case, bench.folder / "local", bench.images, check=True)
        equal = {name: found["whole"] and found["exact"] for name, found in whole.items()}
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ["ours", *names]}
        for number in range(bench.rounds):
            print(f"{case}: round {number + 1} of {bench.rounds} …", flush=True)
            for name, values in found.items():
                images = bench.images if name in FAST else bench.part
                values.append(bench.read(name, case, bench.folder / "local", images))
        ours = found.pop("ours")
        for name, theirs in found.items():
            agree = equal["ours"] and equal["ours of all"] and equal[name]
            peer = f"{name}, unmoved floats" if name == "paper" else name
            spent = {"peer_cpu_value": _of(theirs, "cpu_rate"), "cpu_value": _of(ours, "cpu_rate")}
            spent["cpu_ratio"] = spent["cpu_value"] / spent["peer_cpu_value"]
            bench.row(case, peer, _all(theirs, "rate"), _all(ours, "rate"), "images/s", agree, **spent)
        for name, theirs in found.items():
            bench.row(f"{case}, first", name, _all(theirs, "first_s"), _all(ours, "first_s"), "s", None)
        for name, theirs in found.items():
            bench.row(f"{case}, memory", name, _all(theirs, "private_mb"), _all(ours, "private_mb"), "MB", None)
        bench.rows[-1]["imported_mb"] = _of(ours, "imported_mb")


def run_large(bench: Bench) -> None:
    """Ours on a set ten times as large as the other, which no page cache need hold: same speed, same memory."""
    small, large = bench.folder / "local", bench.folder / "large"
    for path in small.iterdir() if small.is_dir() else ():
        if path.name != "shards":
            shutil.rmtree(path)  # room for the large set
    if not (small / "shards").is_dir():
        bench.write(small, {"shards"}, bench.images)
    bench.write(large, {"shards"}, LARGE * bench.images)
    for case in (AUGMENTED, RAW):
        ones, tens = [], []
        for number in range(bench.rounds):
            print(f"{case} of {LARGE * bench.images:,} images: round {number + 1} of {bench.rounds} …", flush=True)
            ones.append(bench.read("ours", case, small, bench.images))
            tens.append(bench.read("ours", case, large, LARGE * bench.images))
        print("looking at an epoch …", flush=True)
        seen = bench.read("ours", case, large, LARGE * bench.images, check=True)
        equal, peer = seen["whole"] and seen["exact"], f"ours, {bench.images:,} images"
        spent = {"peer_cpu_value": _of(ones, "cpu_rate"), "cpu_value": _of(tens, "cpu_rate")}
        bench.row(f"{case}, large", peer, _all(ones, "rate"), _all(tens, "rate"), "images/s", equal, **spent)
        bench.row(f"{case}, large, first", peer, _all(ones, "first_s"), _all(tens, "first_s"), "s", None)
        bench.row(f"{case}, large, memory", peer, _all(ones, "private_mb"), _all(tens, "private_mb"), "MB", None)
    shutil.rmtree(large)


def run_s3(bench: Bench) -> None:
    """From a loopback S3 server (on the other cores, where there are some) into an empty cache, to the last image."""
    from tests.s3_server import BUCKET, S3Server, why_not

    folder = bench.folder / "s3"
    reason = why_not(folder)
    if reason is not None:
        bench.skip(S3_COLD, "boto3", reason)
        return
    images = min(bench.images, 200_000)
    with S3Server(folder) as server:
        for process in server.processes:
            os.sched_setaffinity(process.pid, bench.other_cores)
        place = f"s3://{BUCKET}/set"
        os.environ.update(server.environment)
        print(f"sending {images:,} images …", flush=True)
        bench.child(write="shards", place=place, images=images, cores=bench.cores + bench.other_cores)
        readers = ("ours", "boto3", "boto3, into files")

        def read(reader: str, *, check: bool = False) -> dict[str, Any]:
            with tempfile.TemporaryDirectory(dir=bench.folder) as cache:
                task = {"reader": reader, "case": S3_COLD, "place": place, "images": images, "cache": cache}
                return bench.child(**task, check=check)

        seen = [read(reader, check=True) for reader in readers]
        equal = all(one["whole"] and one["exact"] for one in seen)
        found: dict[str, list[dict[str, Any]]] = {reader: [] for reader in readers}
        for number in range(bench.rounds):
            print(f"{S3_COLD}: round {number + 1} of {bench.rounds} …", flush=True)
            for reader, values in found.items():
                values.append(read(reader))
        ours = found.pop("ours")
        for reader, theirs in found.items():
            bench.row(S3_COLD, reader, _all(theirs, "whole_rate"), _all(ours, "whole_rate"), "images/s", equal)


def _all(found: list[dict[str, Any]], name: str) -> list[float]:
    return [one[name] for one in found]


def _of(found: list[dict[str, Any]], name: str) -> float:
    return median(_all(found, name))


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder that is deleted however this ends, short of SIGKILL."""

    def end(number: int, _: object) -> None:
        sys.exit(f"ended by {signal.Signals(number).name}")

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    with tempfile.TemporaryDirectory(prefix="proxyrob-data-", dir=folder) as name:
        yield Path(name)


def require_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        sys.exit(
            f"{folder} has {free / 1e9:.0f} GB free and {needed_bytes / 1e9:.0f} are needed; choose another --folder or --quick"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 images and short rounds")
    parser.add_argument("--large", action="store_true", help="also a set ten times as large")
    parser.add_argument("--threads", type=int, default=1, help="cores of each reader")
    parser.add_argument("--images", type=int, help="images of the local set (default: a million)")
    parser.add_argument("--batches", type=int, help="batches in a round of the slower readers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="*", choices=(AUGMENTED, RAW, S3_COLD), default=[AUGMENTED, RAW, S3_COLD])
    parser.add_argument("--peers", nargs="+", choices=sorted(set(FORMATS) - {"ours"}), help="compare with these alone")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where images are written")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    arguments.images = arguments.images or (100_000 if arguments.quick else 1_000_000)
    arguments.batches = arguments.batches or (40 if arguments.quick else 200)
    with scratch(arguments.folder) as folder:
        bench = Bench(arguments, folder)
        require_space(folder, arguments.images * 3072 * (LARGE + 2 if arguments.large else 7) + 10**9)
        print(f"{platform.processor() or platform.machine()}, cores {bench.cores}, load {os.getloadavg()[0]:.1f}")
        print(f"{'case':<20} {'peer':<28} {'peer':>12} {'ours':>12} {'unit':<9} {'ratio':>9}")
        run(bench, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(bench.rows, indent=1) + "\n")


def run(bench: Bench, arguments: argparse.Namespace) -> None:
    """The cases that were asked for."""
    every = {AUGMENTED: ["plain", "paper", "npz", "mosaicml-streaming", "webdataset"]}
    every[RAW] = ["plain", "npz", "npz-sliced", "mosaicml-streaming", "webdataset"]
    wanted = {
        case: [peer for peer in peers if arguments.peers is None or peer in arguments.peers]
        for case, peers in every.items()
        if case in arguments.cases
    }
    if AUGMENTED in wanted and "paper" in wanted[AUGMENTED] and (bench.checkout is None or not bench.checkout.is_dir()):
        wanted[AUGMENTED].remove("paper")
        bench.skip(AUGMENTED, "paper", f"no checkout $PROXYROB_PEERS/{PAPER}")
    parts: list[Callable[[], None]] = []
    if S3_COLD in arguments.cases:
        parts.append(lambda: run_s3(bench))
    if wanted:
        parts.append(lambda: run_local(bench, wanted))
    if arguments.large:
        parts.append(lambda: run_large(bench))
    for part in parts:
        part()
        if arguments.json:  # what an interrupted run has found is kept
            arguments.json.write_text(json.dumps(bench.rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
