"""A real MLflow server on loopback, by the command that ``proxyrob serve mlflow`` becomes."""

import os
import subprocess
import time
from pathlib import Path

from flows.settings import Settings
from flows.stack.answers import ask
from flows.stack.services import describe_service
from tests.s3_server import free_ports

START_S = 240.0


class MlflowServer:
    """The server of a home, which may be killed and started again; ``site`` is what a site sets of it."""

    def __init__(self, home: Path, **site: str) -> None:
        self.home = home
        (self.port,) = free_ports(1)
        left_out = ("PREFECT", "MLFLOW", "PROXYROB", "AWS_", "PYTEST")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        self._given = {**kept, "MLFLOW_PORT": str(self.port), **site}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.home / "mlflow-server.log"

    def start(self, *, wait: bool = True) -> None:
        """Start it, and wait until it answers."""
        settings = Settings(home=self.home)
        settings.stack.mkdir(parents=True, exist_ok=True)
        command = describe_service("mlflow", settings, self._given)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command.arguments, env=command.environment, stdout=log, stderr=log, cwd=self.home, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while wait and not ask(f"{self.url}/health").is_good:
            assert self._process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def kill(self) -> None:
        """As when the machine dies: all its processes at once."""
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None
