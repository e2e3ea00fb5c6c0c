"""Does mixing help, and is it the generative model? Whole runs over several seeds, with the control.

One run compares two networks; it says nothing of other seeds. This repeats `proxyrob run digits` and the control
`digits-jitter` with other seeds (split, proxy, labelers, training and attacks all change) and prints the mean, the
standard deviation and Student's 95 % interval of the paired differences over seeds.

    .venv/bin/python benchmarks/seeds.py --seeds 5 --json seeds.json

Takes about three minutes per seed on two cores. The test splits of different seeds overlap (797 of 1,797 images), so the
seeds are not independent in the images; the interval covers training and selection of data, not another data set.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

PRESETS = {"diffusion": "digits", "jitter": "digits-jitter"}


def run(preset: str, seed: int, folder: Path) -> dict[str, Any]:
    """One whole run; its report."""
    output = folder / f"{preset}-{seed}"
    command = [str(Path(sys.executable).with_name("proxyrob")), "run", preset, "--set", f"seed={seed}", "--output", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((output / "report.json").read_text())


def figures(model: dict[str, Any]) -> dict[str, float]:
    """The accuracies of a model in a report, certified ones by their radius."""
    attacked = {name: model[name]["value"] for name in ("clean", "pgd", "autoattack")}
    return attacked | {f"certified {radius}": share["value"] for radius, share in model["certified"].items()}


def summarise(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation and Student's 95 % interval of the mean, in points."""
    points = 100.0 * np.array(values)
    half = float(stats.t.ppf(0.975, len(points) - 1) * points.std(ddof=1) / np.sqrt(len(points)))
    mean = float(points.mean())
    return {
        "mean": mean,
        "sd": float(points.std(ddof=1)),
        "low": mean - half,
        "high": mean + half,
        "per_seed": [round(float(p), 1) for p in points],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0 on (at least 2)")
    parser.add_argument("--output", type=Path, default=Path("seeds"), help="folder of the runs' outputs")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2: a spread needs two values")
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in PRESETS}
    for seed in range(arguments.seeds):
        for name, preset in PRESETS.items():
            print(f"seed {seed}, {preset} …", flush=True)
            reports[name].append(run(preset, seed, arguments.output))
    models = {
        "real-only": [figures(report["models"]["real-only"]) for report in reports["diffusion"]],
        "mixed, diffusion": [figures(report["models"]["mixed"]) for report in reports["diffusion"]],
        "mixed, jitter": [figures(report["models"]["mixed"]) for report in reports["jitter"]],
    }
    names = list(models["real-only"][0])
    accuracies = {(name, figure): [model[figure] for model in found] for name, found in models.items() for figure in names}
    pairs = (("mixed, diffusion", "real-only"), ("mixed, jitter", "real-only"), ("mixed, diffusion", "mixed, jitter"))
    table: list[dict[str, Any]] = [
        {"what": name, "figure": figure, **summarise(values)} for (name, figure), values in accuracies.items()
    ]
    for first, second in pairs:
        for figure in names:
            difference = [a - b for a, b in zip(accuracies[first, figure], accuracies[second, figure], strict=True)]
            table.append({"what": f"{first} − {second}", "figure": figure, **summarise(difference)})
    print(f"\n{arguments.seeds} seeds, points; mean ± standard deviation over seeds [95 % interval of the mean]")
    for row in table:
        print(
            f"{row['what']:<34} {row['figure']:<14} {row['mean']:+7.1f} ± {row['sd']:.1f}  "
            f"[{row['low']:+.1f}, {row['high']:+.1f}]  {row['per_seed']}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
