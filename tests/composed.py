"""What ``deployments/compose.yaml`` says, and its services started by the same commands and variables without containers."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import psutil
import yaml

from flows.stack.answers import Answer, ask
from flows.stack.processes import MARK, kill_processes
from tests.s3_server import BUCKET, KEY, SECRET, S3Server, free_ports

ROOT = Path(__file__).parents[1]
FILE = ROOT / "deployments" / "compose.yaml"
EXAMPLE = ROOT / "deployments" / "stack.env.example"
PROGRAM = str(Path(sys.executable).with_name("proxyrob"))
POSTGRES_USER = "proxyrob"
START_S, RESTART_S = 300.0, 2.0

VARIABLE = re.compile(r"\$\{(\w+)(:\?([^}]*))?\}")


def read_services() -> dict[str, Any]:
    """The services of the file as they are written."""
    return yaml.safe_load(FILE.read_text())["services"]


def substitute(text: str, variables: Mapping[str, str]) -> str:
    """As Compose does it: ``${NAME}``, and ``${NAME:?message}`` which refuses an empty one."""
    return VARIABLE.sub(lambda found: variables[found[1]], text)


@dataclass(frozen=True)
class Composed:
    """The services with variables filled in, and each host name of the file replaced by an address of loopback."""

    variables: dict[str, str]
    addresses: dict[str, str]

    def command(self, name: str) -> list[str]:
        """The command of one of our services, with the entrypoint of the image before it."""
        return [PROGRAM, *read_services()[name]["command"]]

    def environment(self, name: str) -> dict[str, str]:
        """The variables that the file gives a service."""
        given = {}
        for key, value in read_services()[name]["environment"].items():
            text = substitute(str(value), self.variables)
            for host, address in self.addresses.items():
                text = text.replace(host, address)
            given[key] = text
        return given


@dataclass
class Postgres:
    """PostgreSQL from the system, with its data below a folder, as the image of the file would have it."""

    folder: Path
    port: int
    password: str
    programs: Path = field(default_factory=lambda: max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nowhere")))

    @property
    def as_user(self) -> dict[str, Any]:
        """It refuses to run as root."""
        return {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}

    def start(self) -> None:
        """Make the cluster and both databases, and wait until it answers."""
        data, secret = self.folder / "data", self.folder / "password"
        self.folder.mkdir(parents=True)
        secret.write_text(self.password)
        if self.as_user:
            for folder in (self.folder, secret):
                shutil.chown(folder, "postgres", "postgres")
        self._run("initdb", "-D", data, "-U", POSTGRES_USER, "-A", "scram-sha-256", f"--pwfile={secret}", "-N")
        self.start_again()
        for name in ("prefect", "mlflow"):
            self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", POSTGRES_USER, name)

    def start_again(self) -> None:
        """Start with the data that is there, and wait until it answers."""
        options = f"-h 127.0.0.1 -p {self.port} -k {self.folder}"
        self._run("pg_ctl", "-D", self.folder / "data", "-l", self.folder / "log", "-w", "-o", options, "start")

    def dump(self, name: str) -> bytes:
        """Everything that a database holds."""
        return self._run("pg_dump", "-h", "127.0.0.1", "-p", str(self.port), "-U", POSTGRES_USER, name)

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self.folder / "data", "-m", "fast", "stop")

    def find(self) -> psutil.Process | None:
        """The server's first process, while it runs."""
        try:
            number = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
            return psutil.Process(number)
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None

    def kill(self) -> None:
        """As a power cut would."""
        if (server := self.find()) is not None:
            kill_processes([server, *server.children(recursive=True)])

    def _run(self, program: str, *arguments: str | Path) -> bytes:
        environment = {"PATH": os.environ["PATH"], "PGPASSWORD": self.password, "LC_ALL": "C.UTF-8"}
        command = [str(self.programs / program), *map(str, arguments)]
        return subprocess.run(command, env=environment, check=True, capture_output=True, cwd=self.folder, **self.as_user).stdout


class Services:
    """The services of the compose file as processes of this machine, with data below ``folder`` and ``database``.

    ``home`` is that of the workers. What has ended is started again once ``keep`` was called, as ``restart: unless-stopped``
    of the file says.
    """

    def __init__(self, folder: Path, database: Path, s3: S3Server, home: Path | None = None) -> None:
        self.folder, self.s3, self.home = folder, s3, home or folder
        ports = dict(zip(("postgres", "prefect", "mlflow"), free_ports(3), strict=True))
        self.postgres = Postgres(database / "postgres", ports["postgres"], "letters4digits")
        self.composed = Composed(
            {
                "POSTGRES_PASSWORD": self.postgres.password,
                "PREFECT_AUTH": "admin:open-sesame",
                "MLFLOW_ADMIN": "keeper",
                "MLFLOW_ADMIN_PASSWORD": "open/the+registry",
                "S3_KEY": KEY,
                "S3_SECRET": SECRET,
                "S3_BUCKET": BUCKET,
            },
            {
                "postgres:5432": f"127.0.0.1:{ports['postgres']}",
                "http://s3:8333": s3.url,
                "prefect:4200": f"127.0.0.1:{ports['prefect']}",
                "mlflow:5000": f"127.0.0.1:{ports['mlflow']}",
                "0.0.0.0": "127.0.0.1",  # noqa: S104  (what a container listens on)
            },
        )
        self.ports = {"PREFECT_SERVER_API_PORT": str(ports["prefect"]), "MLFLOW_PORT": str(ports["mlflow"])}
        self.mark = uuid.uuid4().hex
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._kept = threading.Event()

    def environment(self, name: str) -> dict[str, str]:
        given = self.composed.environment(name)
        moved = {key: value for key, value in self.ports.items() if key in given}
        ours = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "PROXYROB_HOME": str(self.home), MARK: self.mark}
        return {**ours, **given, **moved}

    def start(self, name: str) -> None:
        """Start a service."""
        self.running[name] = self._run(name)

    def deploy(self) -> None:
        """Run the service that ends. Raises ``RuntimeError`` with the end of its log when it failed."""
        if self._run("deploy").wait(START_S) != 0:
            raise RuntimeError((self.folder / "deploy.log").read_text()[-2000:])

    def _run(self, name: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            command, environment = self.composed.command(name), self.environment(name)
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)

    def start_all(self, worker: str = "worker-cpu") -> None:
        """Start everything in order, and return when a worker has taken up work. Raises ``TimeoutError``."""
        self.postgres.start()
        self.start("prefect")
        self.start("mlflow")
        mlflow = self.environment("deploy")["PROXYROB_TRACKING_URI"]
        wait_until(lambda: self.ask("health").is_good and ask(f"{mlflow}/health").is_good, START_S, "both servers")
        self.deploy()
        self.start(worker)
        pool = worker.removeprefix("worker-")
        wait_until(lambda: bool(self.ask(f"work_pools/{pool}/workers/filter", {}).content), START_S, "a worker")

    def ask(self, path: str, body: object = None) -> Answer:
        clients = self.environment("deploy")
        return ask(f"{clients['PREFECT_API_URL']}/{path}", body, credentials=clients["PREFECT_API_AUTH_STRING"])

    @property
    def mlflow_credentials(self) -> str:
        return f"{self.composed.variables['MLFLOW_ADMIN']}:{self.composed.variables['MLFLOW_ADMIN_PASSWORD']}"

    def secrets(self) -> dict[str, set[bytes]]:
        """Every secret of the stack, in each form in which it could be written down."""
        given = self.composed.variables
        plain = {
            "of PostgreSQL": given["POSTGRES_PASSWORD"],
            "of Prefect": given["PREFECT_AUTH"].partition(":")[2],
            "of MLflow": given["MLFLOW_ADMIN_PASSWORD"],
            "of S3": given["S3_SECRET"],
        }
        signed = {"of Prefect": given["PREFECT_AUTH"], "of MLflow": self.mlflow_credentials}
        forms = {
            name: {secret, quote(secret, safe=""), quote_plus(secret), b64encode(secret.encode()).decode()}
            for name, secret in plain.items()
        }
        for name, pair in signed.items():
            forms[name].add(b64encode(pair.encode()).decode())
        return {name: {form.encode() for form in found} for name, found in forms.items()}

    def written(self) -> Iterator[tuple[str, bytes]]:
        """All that the stack has written down, by its place: databases, logs, the home of worker and servers, S3."""
        for name in ("prefect", "mlflow"):
            yield f"database {name}", self.postgres.dump(name)
        yield "log of PostgreSQL", (self.postgres.folder / "log").read_bytes()
        for path in self.folder.rglob("*"):
            if path.is_file() and path.name != "mlflow-auth.ini":  # which has the address of the users' database, for its owner
                yield str(path), path.read_bytes()
        client = self.s3.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
            for item in page.get("Contents", ()):
                yield item["Key"], client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read()

    def kill(self, name: str) -> None:
        """Kill a service with all that it is made of, as a power cut would; of a worker not the runs it has started."""
        if name == "postgres":
            self.postgres.kill()
        elif name == "s3":
            self.s3.kill()
        else:
            process = psutil.Process(self.running[name].pid)
            kill_processes([process, *([] if name.startswith("worker") else process.children(recursive=True))])

    def keep(self) -> None:
        """Start again whatever ends from now on, a few seconds later, until ``stop``."""
        self._kept.set()
        threading.Thread(target=self._keep, daemon=True).start()

    def _keep(self) -> None:
        while self._kept.is_set():
            time.sleep(RESTART_S)
            if self.postgres.find() is None:
                self.postgres.start_again()
            if any(process.poll() is not None for process in self.s3.processes) or not self.s3.processes:
                self.s3.restart()
            for name, process in list(self.running.items()):
                if process.poll() is not None:
                    self.start(name)

    def stop(self) -> None:
        """End everything as containers do, each with all it is made of: the worker first, while it can still say good-bye."""
        self._kept.clear()
        time.sleep(RESTART_S)
        for process in reversed(self.running.values()):
            parts = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            kill_processes(parts)
        if self.postgres.find() is not None:
            self.postgres.stop()


def wait_until(true: Callable[[], bool], patience_s: float, what: str) -> None:
    """Return as soon as something is true. Raises ``TimeoutError``."""
    deadline = time.monotonic() + patience_s
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} not within {patience_s:g} s")
        time.sleep(1.0)
