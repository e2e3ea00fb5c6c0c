"""Units of work that workers share in a store of each kind."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from proxyrob.storage import DataPlace, Store, claims
from proxyrob.storage.shared import EndedElsewhere, SharedFiles

NAMES = [f"unit-{number}" for number in range(8)]


def test_workers_share_units_in_any_store(store: Store) -> None:
    """Of four workers at once each unit is done by one, one concludes, and nothing is left but the units.

    Before them a worker of this machine has died at one unit, and another just after it had done one.
    """
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = json.dumps({"machine": claims._machine(), "process": gone.pid, "token": "x"})
    for name in ("unit-2", "unit-5"):
        store.write(f"claims/{name}-000000.json", dead.encode())
    store.write("unit-5.txt", b"done before")
    done: list[str] = []
    ended, starting = threading.Event(), threading.Barrier(4)

    def write(name: str) -> None:
        time.sleep(0.02)
        done.append(name)
        store.write(f"{name}.txt", name.encode())

    def work(_number: int) -> bool:
        shared = SharedFiles(DataPlace(store.uri), ".txt", ended.is_set)
        starting.wait()
        try:
            shared.complete(NAMES, write)
            shared.conclude(ended.set)
        except EndedElsewhere:
            return False
        return True

    with ThreadPoolExecutor(4) as workers:
        assert sorted(workers.map(work, range(4))) == [False, False, False, True]
    assert sorted(done) == [name for name in NAMES if name != "unit-5"]
    assert [found.key for found in store.list()] == [f"{name}.txt" for name in NAMES]
