"""What ``deployments/compose.yaml`` says, and its services started by the same commands and variables without containers."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
FILE = ROOT / "deployments" / "compose.yaml"
EXAMPLE = ROOT / "deployments" / "stack.env.example"
PROGRAM = str(Path(sys.executable).with_name("proxyrob"))
POSTGRES_USER = "proxyrob"

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
        options = f"-h 127.0.0.1 -p {self.port} -k {self.folder}"
        self._run("initdb", "-D", data, "-U", POSTGRES_USER, "-A", "scram-sha-256", f"--pwfile={secret}", "-N")
        self._run("pg_ctl", "-D", data, "-l", self.folder / "log", "-w", "-o", options, "start")
        for name in ("prefect", "mlflow"):
            self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", POSTGRES_USER, name)

    def dump(self, name: str) -> bytes:
        """Everything that a database holds."""
        return self._run("pg_dump", "-h", "127.0.0.1", "-p", str(self.port), "-U", POSTGRES_USER, name)

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self.folder / "data", "-m", "fast", "stop")

    def _run(self, program: str, *arguments: str | Path) -> bytes:
        environment = {"PATH": os.environ["PATH"], "PGPASSWORD": self.password, "LC_ALL": "C.UTF-8"}
        command = [str(self.programs / program), *map(str, arguments)]
        return subprocess.run(command, env=environment, check=True, capture_output=True, cwd=self.folder, **self.as_user).stdout
