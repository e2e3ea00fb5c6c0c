"""A stack that is left alone for an hour while everything it is made of is killed in turn.

    .venv/bin/python benchmarks/soak.py --json soak.json           # about an hour and a half on two cores
    .venv/bin/python benchmarks/soak.py --quick                    # small runs, each fault once: a quarter of an hour

The services of `deployments/compose.yaml` are started as processes of this machine (PostgreSQL from the system, OpenStack Swift
as S3), with passwords, and started again when they end, as the file's `restart: unless-stopped` says. The `digits` deployment
is triggered by schedules, one run after the other, each with another seed. While a run goes on, at a moment drawn at random,
one thing is killed with SIGKILL (or the disk is filled for half a minute); nobody helps afterwards, but a run that has plainly
failed is started again, as a person would. At the end every run's tables are read image by image and held against MLflow, the
registry, and the same runs undisturbed (all, or those of `--undisturbed SEED …`); whatever belongs to nobody is listed.

The disk is a file system in memory of its own (needs root; skipped otherwise).
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import psutil

from benchmarks.soak_audit import (
    check_record,
    check_registry,
    compare_tables,
    count_images,
    describe_state,
    dump,
    find_orphans,
    plan_of,
)
from flows.settings import Settings, prepare_environment
from flows.stack.processes import find_marked, kill_processes
from tests.composed import Services, wait_until
from tests.e2e.conftest import TINY
from tests.s3_server import S3Server

DISK_BYTES, DISK_FULL_S = 400 << 20, 30.0
AFTER_S = 10.0
"""How long after the end of a run the next one is scheduled for."""
RUN_PATIENCE_S = 1800.0
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
CONTROL = "nothing"
SERVERS = ("mlflow", "s3", "postgres", "prefect")

Row = dict[str, Any]


class Faults:
    """The things that are done to a stack. Each returns when it is done; recovering is the stack's own business."""

    def __init__(self, services: Services, disk: Path | None) -> None:
        self.services, self.disk = services, disk
        self.kinds: dict[str, Callable[[], str]] = {
            "flow run": self.kill_run,
            "worker": lambda: self.kill("worker-cpu"),
            **{name: lambda name=name: self.kill(name) for name in SERVERS},
            "a stage's process": self.kill_stage,
            "everything at once": self.cut_power,
        }
        if disk is not None:
            self.kinds["disk full"] = self.fill_disk

    def kill(self, name: str) -> str:
        """One service, with its processes."""
        self.services.kill(name)
        return "killed"

    def kill_run(self) -> str:
        """The process of the flow run."""
        kill_processes(self._runs())
        return "killed"

    def kill_stage(self) -> str:
        """One of the processes that compute."""
        servers = [child for run in self._runs() for child in run.children()]
        stages = [stage for server in servers for stage in server.children()]
        if not stages:
            return "none was computing"
        kill_processes(stages[:1])
        return "killed"

    def cut_power(self) -> str:
        """All that runs, databases and stores, too."""
        services = [psutil.Process(process.pid) for process in self.services.running.values() if process.poll() is None]
        kill_processes([*self._runs(), *services, *(part for service in services for part in service.children(recursive=True))])
        for name in ("postgres", "s3"):
            self.services.kill(name)
        return "killed"

    def fill_disk(self) -> str:
        """The disk of PROXYROB_HOME, for half a minute."""
        assert self.disk is not None
        ballast = self.disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue
        time.sleep(DISK_FULL_S)
        ballast.unlink()
        return f"full for {DISK_FULL_S:g} s"

    def _runs(self) -> list[psutil.Process]:
        worker = psutil.Process(self.services.running["worker-cpu"].pid)
        found = [child for child in worker.children() if "prefect" in " ".join(child.cmdline())]
        if not found:  # the worker was killed before, and its runs go on without it
            found = [process for process in find_marked(self.services.mark) if "prefect.engine" in " ".join(process.cmdline())]
        return found


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of its own for the home, or ``None`` where that takes rights that we have not."""
    if os.geteuid() != 0:
        yield None
        return
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def schedule_run(services: Services, deployment: str, preset: str, seed: int) -> None:
    """A schedule that triggers the deployment once, soon, with a seed. Raises ``TimeoutError`` when it is not taken."""
    moment = datetime.now(UTC) + timedelta(seconds=AFTER_S)
    rule = f"DTSTART:{moment:%Y%m%dT%H%M%SZ}\nRRULE:FREQ=DAILY;COUNT=1"
    parameters = {"preset": preset, "changes": [f"seed={seed}"]}
    schedule = {"schedule": {"rrule": rule}, "active": True, "parameters": parameters, "slug": f"soak-{seed}"}
    wait_until(lambda: services.ask(f"deployments/{deployment}/schedules", [schedule]).is_good, RUN_PATIENCE_S, "a schedule")
    # what the scheduler does by itself once a minute
    wait_until(lambda: services.ask(f"deployments/{deployment}/schedule", {}).is_good, RUN_PATIENCE_S, "a scheduled run")


def find_run(services: Services, deployment: str, seed: int) -> Row | None:
    """The newest run with a seed."""
    wanted = {"deployments": {"id": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_DESC"}
    answer = services.ask("flow_runs/filter", wanted)
    runs = answer.content if answer.is_good else []
    return next((run for run in runs if run["parameters"].get("changes") == [f"seed={seed}"]), None)


def attend(services: Services, deployment: str, seed: int, kind: str, faults: Faults, moment_s: float) -> Row:
    """Wait for a scheduled run, let the fault happen after so long, wait for the end. One that failed is started again once."""

    def is_in(states: set[str]) -> bool:
        run = find_run(services, deployment, seed)
        return run is not None and run["state_type"] in states

    wait_until(lambda: is_in({"RUNNING", *ENDED}), RUN_PATIENCE_S, f"the start of seed {seed}")
    started = time.monotonic()
    row: Row = {"seed": seed, "fault": kind, "after_s": round(moment_s, 1), "retriggered": False}
    if kind != CONTROL:
        time.sleep(moment_s)
        row["did"] = faults.kinds[kind]()
    deadline = time.monotonic() + RUN_PATIENCE_S
    while True:
        run = find_run(services, deployment, seed)
        if run is not None and run["state_type"] == "COMPLETED":
            break
        if run is not None and run["state_type"] in {"FAILED", "CANCELLED"}:
            row["failed_with"] = describe_state(run)
            if row["retriggered"]:
                break
            row["retriggered"] = True
            services.ask(f"deployments/{deployment}/create_flow_run", {"parameters": run["parameters"]})
        if time.monotonic() > deadline:
            break
        time.sleep(1.0)
    row |= {"seconds": round(time.monotonic() - started, 1), "state": describe_state(run) if run else "no answer"}
    row["attempts"] = run["run_count"] if run else None
    print(f"seed {seed:<3} {kind:<20} {row['seconds']:>7.1f} s  attempts {row['attempts']}  {row['state']}", flush=True)
    if "failed_with" in row:
        print(f"         failed with: {row['failed_with']}", flush=True)
    return row


def run_undisturbed(preset: str, seeds: Iterable[int], home: Path) -> None:
    """The same runs, in peace, without any server."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW", "PROXYROB", "AWS"))
    }
    for seed in seeds:
        command = [str(Path(sys.executable).with_name("proxyrob")), "run", preset, "--set", f"seed={seed}"]
        started = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment | {"PROXYROB_HOME": str(home)})
        print(f"seed {seed:<3} undisturbed {time.monotonic() - started:.1f} s", flush=True)


def audit(services: Services, settings: Settings, rows: list[Row], preset: str, peaceful: Path, seeds: Collection[int]) -> Row:
    """Look at everything that is left, and hold the runs with ``seeds`` against those of a peaceful home."""
    from mlflow import MlflowClient

    uri = services.environment("deploy")["PROXYROB_TRACKING_URI"]
    client, plans, faults = MlflowClient(uri, uri), [], []
    images = {"images": 0, "lost": 0, "twice": 0}
    for row in rows:
        if not row["state"].startswith("Completed"):
            faults += [] if row["state"].startswith("Failed") else [f"seed {row['seed']} has not ended: {row['state']}"]
            continue
        plan = plan_of(settings, preset, (f"seed={row['seed']}",))
        plans.append(plan)
        for name, number in count_images(plan).items():
            images[name] += number
        faults += [f"seed {row['seed']}: {fault}" for fault in check_record(client, plan)]
        if row["seed"] in seeds:
            other = plan_of(Settings(home=peaceful), preset, (f"seed={row['seed']}",))
            faults += [f"seed {row['seed']}: {name} are others than undisturbed" for name in compare_tables(plan, other)]
    if plans:
        faults += check_registry(client, plans)
    return {
        **images,
        "compared_with_undisturbed": len(seeds),
        "disagreements": faults,
        "orphans": find_orphans(services, client, settings),
    }


def summarise(rows: list[Row], audited: Row) -> Row:
    """The figures of the whole."""
    controls = [row["seconds"] for row in rows if row["fault"] == CONTROL]
    peace = median(controls) if controls else None
    injected = [row for row in rows if row["fault"] != CONTROL]
    survived = [row for row in injected if row["state"].startswith("Completed") and not row["retriggered"]]
    plainly = [row for row in injected if row["retriggered"] and row["state"].startswith("Completed")]
    lost = {row["fault"]: round(row["seconds"] - peace, 1) for row in injected} if peace is not None else {}
    return {
        "faults_injected": len(injected),
        "survived_by_itself": len(survived),
        "failed_plainly_and_completed_when_triggered_again": len(plainly),
        "undisturbed_seconds": peace,
        "seconds_lost": lost,
        **audited,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, help="how often the deployment is triggered (default: 12, quick: 10)")
    parser.add_argument("--quick", action="store_true", help="a small pipeline in place of digits")
    parser.add_argument("--faults", nargs="+", help="these alone, by the names in the table, such as 'disk full'")
    parser.add_argument(
        "--undisturbed",
        type=int,
        nargs="*",
        help="seeds of the runs that are made once more in peace, to compare (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the faults")
    parser.add_argument("--json", type=Path, help="write what was found here as well")
    parser.add_argument("--keep", type=Path, help="copy logs and homes here at the end")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="proxyrob-soak-")))
        folder.chmod(0o755)  # PostgreSQL runs as another user
        if arguments.keep:
            stack.callback(lambda: shutil.copytree(folder / "services", arguments.keep, dirs_exist_ok=True))
        rows, found = soak(arguments, folder, stack)
    for name, value in found.items():
        print(f"{name:<52} {value}")
    if arguments.json:
        dump(arguments.json, {"runs": rows, "found": found})
    if found["lost"] or found["twice"] or found["disagreements"] or found["orphans"]:
        sys.exit("something was lost, disagrees or is orphaned: see above")


def _end(*_: object) -> NoReturn:
    """End what was started, too; whoever asks twice has to wait for that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def soak(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> tuple[list[Row], Row]:
    """The whole: the runs undisturbed, the stack, the schedule, the faults, the audit."""
    drawn = random.Random(arguments.seed)  # noqa: S311  (moments, not secrets)
    preset, longest_s = "digits", 90.0
    if arguments.quick:
        (folder / "tiny.yaml").write_text(TINY)
        preset, longest_s = str(folder / "tiny.yaml"), 8.0
    disk = stack.enter_context(small_disk(folder / "home"))
    for name in ("services", "s3"):
        (folder / name).mkdir()
    s3 = stack.enter_context(S3Server(folder / "s3"))
    services = Services(folder / "services", folder, s3, home=folder / "home")
    stack.callback(services.stop)
    faults = Faults(services, disk)
    kinds = [CONTROL, *(arguments.faults or faults.kinds), CONTROL]
    if unknown := set(kinds) - {CONTROL, *faults.kinds}:
        sys.exit(f"unknown faults {sorted(unknown)}: choose from {', '.join(faults.kinds)}")
    runs = range(arguments.runs or len(kinds))
    peaceful = folder / "undisturbed"
    compared = runs if arguments.undisturbed is None else arguments.undisturbed
    run_undisturbed(preset, compared, peaceful)
    services.start_all()
    services.keep()
    os.environ.update(services.environment("deploy"))
    settings = Settings()
    prepare_environment(settings)
    deployment = services.ask("deployments/name/proxyrob/digits").content["id"]
    rows = []
    for seed in runs:
        schedule_run(services, deployment, preset, seed)
        rows.append(attend(services, deployment, seed, kinds[seed % len(kinds)], faults, drawn.uniform(1.0, longest_s)))
    found = summarise(rows, audit(services, settings, rows, preset, peaceful, compared))
    services.stop()
    found["orphans"] += [f"process: {' '.join(process.cmdline())[:120]}" for process in find_marked(services.mark)]
    return rows, found


if __name__ == "__main__":
    main()
