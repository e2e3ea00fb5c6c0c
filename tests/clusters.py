"""Real clusters on this machine: nodes that are processes of their own, started by the commands of Dask and Ray, and killed.

Dask listens on loopback. So does Ray for its nodes' addresses (each has one of its own in 127.0.0.0/8), but its servers listen
on all interfaces, as they always do: a token keeps others out.
"""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.s3_server import free_ports

ROOT = Path(__file__).parents[1]
START_S = 120.0
CLUSTER, NODE = "PROXYROB_TEST_CLUSTER", "PROXYROB_TEST_NODE"
"""In the environment of all processes of a node: of which cluster it is, and which one."""


class LocalCluster(ABC):
    """Nodes with room for one worker each. ``environment`` is what a run needs to use them."""

    started = "Ready"
    """What a node says when it takes work."""

    def __init__(self, folder: Path, units: Path, unit_s: float) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        left_out = ("PREFECT", "MLFLOW", "PROXYROB", "AWS_", "DASK", "RAY")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        self._mark = secrets.token_hex(8)
        self._nodes_environment = {
            **kept,
            CLUSTER: self._mark,
            "DO_NOT_TRACK": "true",
            "OMP_NUM_THREADS": "1",
            "PROXYROB_TEST_UNITS": str(units),
            "PROXYROB_TEST_UNIT_S": str(unit_s),
            "PYTHONPATH": f"{ROOT / 'tests' / 'on_nodes'}:{ROOT}",
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    @abstractmethod
    def environment(self) -> dict[str, str]: ...

    @abstractmethod
    def _start_head(self) -> None: ...

    @abstractmethod
    def _node_command(self, number: int) -> list[str]: ...

    def __enter__(self) -> Self:
        try:
            self._start_head()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def start_node(self, number: int) -> None:
        """Start a node, and wait until it takes work. (Of Ray's nodes two cannot start on one machine at the same moment.)"""
        self._start(f"node-{number}", self._node_command(number))
        self._await(f"node-{number}", self.started)

    def kill(self, name: str) -> None:
        """All processes of a node at once, as when its machine loses power."""
        started = self._running.pop(name)
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(started.pid)
            _kill([root, *root.children(recursive=True)])
        _kill([process for process in psutil.process_iter() if self._is_of(process, name)])  # those that had lost their parent
        started.wait()

    def _is_of(self, process: psutil.Process, name: str) -> bool:
        with suppress(psutil.Error, OSError):
            environment = process.environ()
            return (environment.get(CLUSTER), environment.get(NODE)) == (self._mark, name)
        return False

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            environment = {**self._nodes_environment, NODE: name}
            program = Path(sys.executable).with_name(command[0])
            self._running[name] = subprocess.Popen(
                [program, *command[1:]], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )

    def _await(self, name: str, text: str) -> None:
        deadline = time.monotonic() + START_S
        while text not in self.log(name):
            assert self._running[name].poll() is None, f"{name} has ended: {self.log(name)}"
            assert time.monotonic() < deadline, f"{name} does not get ready: {self.log(name)}"
            time.sleep(0.1)

    def _end(self) -> None:
        for name in list(self._running):
            self.kill(name)


class DaskCluster(LocalCluster):
    """``dask scheduler`` and ``dask worker``."""

    started = "Registered to"

    def __init__(self, folder: Path, units: Path, unit_s: float) -> None:
        super().__init__(folder, units, unit_s)
        (port,) = free_ports(1)
        self.address = f"tcp://127.0.0.1:{port}"

    @property
    def environment(self) -> dict[str, str]:
        return {"PROXYROB_RUNNER": "dask", "PROXYROB_CLUSTER": self.address}

    def _start_head(self) -> None:
        port = self.address.rpartition(":")[2]
        self._start("head", ["dask", "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"])
        self._await("head", "Scheduler at")

    def _node_command(self, number: int) -> list[str]:
        name, folder = f"node-{number}", str(self.folder / f"node-{number}")
        options = ["--host", "127.0.0.1", "--nthreads", "1", "--name", name, "--no-dashboard", "--local-directory", folder]
        return ["dask", "worker", self.address, *options]


class RayCluster(LocalCluster):
    """``ray start``: a head without room for work, and nodes."""

    started = "Ray runtime started"

    def __init__(self, folder: Path, units: Path, unit_s: float) -> None:
        super().__init__(folder, units, unit_s)
        self._secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
        self._nodes_environment |= self._secret
        self._ports = free_ports(2)
        self._home = Path(tempfile.mkdtemp(prefix="ray-"))  # its sockets lie there, whose paths may not be long

    @property
    def environment(self) -> dict[str, str]:
        return {**self._secret, "PROXYROB_RUNNER": "ray", "PROXYROB_CLUSTER": f"127.0.0.2:{self._ports[0]}"}

    @property
    def client_address(self) -> str:
        """For a run on a machine that is no node."""
        return f"ray://127.0.0.2:{self._ports[1]}"

    def _start_head(self) -> None:
        ports = [f"--port={self._ports[0]}", f"--ray-client-server-port={self._ports[1]}"]
        head = ["--head", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={self._home}"]
        self._start("head", ["ray", "start", *head, *ports, *self._options(2)])
        self._await("head", self.started)

    def _node_command(self, number: int) -> list[str]:
        return ["ray", "start", f"--address=127.0.0.2:{self._ports[0]}", "--num-cpus=1", *self._options(number + 2)]

    def _options(self, address: int) -> list[str]:
        ports = ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=80000000", "--include-log-monitor=false"]
        return ["--block", f"--node-ip-address=127.0.0.{address}", *ports]

    def _end(self) -> None:
        super()._end()
        shutil.rmtree(self._home, ignore_errors=True)


ENGINES: dict[str, type[LocalCluster]] = {"dask": DaskCluster, "ray": RayCluster}


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
