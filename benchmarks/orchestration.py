"""What do Prefect and MLflow cost? `proxyrob run` beside the same library calls in one process, A B A B.

    .venv/bin/python benchmarks/orchestration.py --json orchestration.json      # half an hour on one core
    .venv/bin/python benchmarks/orchestration.py --quick                        # the warm cases alone: five minutes

Every measurement is a whole process, from its start to its end, pinned to ``--threads`` cores, one stage at a time.

- `warm`: everything is finished before, so that nothing is computed; what is left is loading, asking and recording. A run that
  was recorded before, with Prefect's API and MLflow's store embedded.
- `warm-servers`: the same against the servers of `proxyrob up`.
- `recorded-anew`: nothing is computed, but the record in MLflow and the registry is made anew (an empty MLflow store).
- `cold`: everything is computed, in an empty home.

`equal` says that both found the same verdicts and certificates on every image.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from flows.plan import pin_config, plan_pipeline
from flows.settings import Settings
from proxyrob.certify import read_certificates
from proxyrob.config import load_config
from proxyrob.evaluate import read_verdicts

ROOT = Path(__file__).parents[1]
PROGRAM = str(Path(sys.executable).with_name("proxyrob"))
PEER = "library calls"
CASES = ("warm", "warm-servers", "recorded-anew", "cold")

Row = dict[str, Any]


class Bench:
    """The rows found so far, and how a process is measured."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.folder, self.rounds, self.preset = folder, arguments.rounds, arguments.preset
        self.cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
        self.rows: list[Row] = []

    def run(self, command: list[str], home: Path, **more: str) -> float:
        """The seconds of a whole process."""
        left_out = ("PREFECT", "MLFLOW", "PROXYROB")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        ours = {"PROXYROB_HOME": str(home), "PROXYROB_WORKERS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        started = time.monotonic()
        done = subprocess.run(
            ["taskset", "-c", ",".join(map(str, self.cores)), *command],
            env=kept | ours | more,
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{command} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        if "direct.py" in " ".join(command) and json.loads(done.stdout.splitlines()[-1])["imported"]:
            raise RuntimeError("the library calls have imported Prefect or MLflow")
        return time.monotonic() - started

    def ours(self, home: Path, **more: str) -> float:
        return self.run([PROGRAM, "run", self.preset], home, **more)

    def direct(self, home: Path) -> float:
        return self.run([sys.executable, str(ROOT / "benchmarks" / "direct.py"), self.preset, str(home)], home)

    def row(self, case: str, peers: list[float], ours: list[float], equal: bool) -> None:
        """Add and print a row."""
        peer_value, value = median(peers), median(ours)
        added = sorted(b - a for a, b in zip(peers, ours, strict=True))
        row = {"case": case, "peer": PEER, "peer_value": peer_value, "value": value, "unit": "s", "ratio": peer_value / value}
        row |= {"rounds": len(ours), "equal": equal, "added_s": median(added), "added_lowest_s": added[0]}
        self.rows.append(row | {"added_highest_s": added[-1], "share": median(added) / value, "load": os.getloadavg()[0]})
        print(
            f"{case:<16}{peer_value:>9.1f} s{value:>9.1f} s   adds {median(added):>5.1f} s [{added[0]:.1f}, {added[-1]:.1f}] "
            f"= {100 * median(added) / value:.1f} %   {'equal' if equal else 'NOT EQUAL'}",
            flush=True,
        )


def are_equal(preset: str, first: Path, second: Path) -> bool:
    """Whether two homes hold the same verdicts and certificates."""
    found = []
    for home in (first, second):
        settings = Settings(home=home)
        plan = plan_pipeline(pin_config(load_config(preset), settings), settings.store, settings.place)
        tables = [read_verdicts(stages.evaluate)[0] for stages in plan.variants.values()]
        tables += [read_certificates(stages.certify)[0].drop(columns="elapsed_s") for stages in plan.variants.values()]
        found.append(tables)
    return all(a.equals(b) for a, b in zip(*found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave the cold case out")
    parser.add_argument("--threads", type=int, default=1, help="cores of each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="digits", help="a preset with a fitted diffusion model, or a YAML file")
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    cases = arguments.cases or [case for case in CASES if case != "cold" or not arguments.quick]
    with tempfile.TemporaryDirectory(prefix="proxyrob-orchestration-") as name:
        bench = Bench(arguments, Path(name))
        print(f"{'case':<16}{PEER:>11}{'ours':>11}", flush=True)
        home, other = bench.folder / "ours", bench.folder / "direct"
        bench.ours(home)
        bench.direct(other)
        equal = are_equal(arguments.preset, home, other)
        for case in cases:
            peers, ours = [], []
            more: dict[str, str] = {}
            if case == "warm-servers":
                bench.run([PROGRAM, "up", "--prefect-port", "0", "--mlflow-port", "0", "--pool", "cpu"], home)
                state = json.loads((home / "stack" / "state.json").read_text())
                more = {
                    "PREFECT_API_URL": f"http://127.0.0.1:{state['prefect_port']}/api",
                    "PROXYROB_TRACKING_URI": f"http://127.0.0.1:{state['mlflow_port']}",
                }
                bench.ours(home, **more)
            try:
                for number in range(bench.rounds):
                    if case == "cold":
                        shutil.rmtree(bench.folder / "cold", ignore_errors=True)
                        home, other = bench.folder / "cold" / "ours", bench.folder / "cold" / "direct"
                    elif case == "recorded-anew":
                        shutil.rmtree(home / "mlflow")
                    peers.append(bench.direct(other))
                    ours.append(bench.ours(home, **more))
                    print(f"  {case}, round {number + 1}: {peers[-1]:.1f} s, {ours[-1]:.1f} s", flush=True)
            finally:
                if case == "warm-servers":
                    bench.run([PROGRAM, "down"], home)
            bench.row(case, peers, ours, equal)
            if arguments.json:
                arguments.json.write_text(json.dumps(bench.rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
