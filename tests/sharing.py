"""Several processes that share units of work in one folder, some of which are killed.

``python -m tests.sharing FOLDER WORKERS KILLED`` forks the workers. Each leaves a line in ``FOLDER/done`` for each unit that
it has done; the first ``KILLED`` of them are killed in the middle of their second unit.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pyarrow as pa

from proxyrob.storage import DataPlace
from proxyrob.storage.shared import EndedElsewhere, SharedTables

NAMES = [f"unit-{k:02d}" for k in range(12)]
ABOUT = {"what": "squares"}
UNIT_S = 0.02


def work(folder: Path, *, dies: bool) -> None:
    """Do units until all are done, then conclude the work or find that another has."""
    begun: list[str] = []
    conclusion = folder / "conclusion"

    def compute(name: str) -> pa.Table:
        begun.append(name)
        time.sleep(UNIT_S)
        if dies and len(begun) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        with (folder / "done").open("a") as file:
            file.write(f"{name}\n")
        return pa.table({"value": [int(name[-2:]) ** 2]})

    def conclude() -> None:
        with (folder / "concluded").open("a") as file:
            file.write("once\n")
        conclusion.write_text(str([shared.read(name)["value"][0].as_py() for name in NAMES]))

    try:
        shared = SharedTables(DataPlace.of(folder / "units"), ABOUT, conclusion.exists)
        shared.tabulate(NAMES, compute)
        shared.conclude(conclude)
    except EndedElsewhere:
        assert conclusion.exists()


def main(folder: Path, workers: int, killed: int) -> int:
    """Whether every worker ended as it should."""
    pids = []
    for number in range(workers):
        pid = os.fork()
        if pid == 0:
            work(folder, dies=number < killed)
            os._exit(0)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return int(codes != [-signal.SIGKILL] * killed + [0] * (workers - killed))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
