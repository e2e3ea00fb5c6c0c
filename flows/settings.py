"""The environment: where things lie and what they run on. Nothing here changes a result, so nothing here is in a digest."""

import os
import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import SplitResult, urlsplit

from platformdirs import user_data_path
from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from proxyrob.storage import DataPlace, open_store
from proxyrob.storage.files import require_writable

PUBLISHED_SETS = "sets"
CONFIGURATION = "configuration.yaml"
"""In a run's output folder: the whole configuration, from which its plan follows."""

Runner = Literal["threads", "dask", "ray"]
ADDRESS_SCHEMES = {"dask": ("tcp", "tls", "ucx", "ws", "wss"), "ray": ("ray", "")}
ADDRESSES = {
    "dask": "such as tcp://scheduler:8786 or tls://scheduler:8786",
    "ray": "such as ray://head:10001, or head:6379 on a machine of the cluster",
}


class Settings(BaseSettings):
    """Read from ``PROXYROB_…`` environment variables."""

    model_config = SettingsConfigDict(env_prefix="PROXYROB_", frozen=True, extra="ignore")

    home: Annotated[Path, Field(description="folder of results, MLflow's and Prefect's embedded stores")] = user_data_path(
        "proxyrob"
    )
    data: Annotated[
        str | None, Field(description="where synthetic images lie: s3://bucket/prefix or a folder; the home when not set")
    ] = None
    cache_gb: Annotated[float, Field(gt=0, description="room for local copies of images that lie on S3")] = 50.0
    tracking_uri: Annotated[str | None, Field(description="MLflow server; the embedded store when not set")] = None
    notify_url: Annotated[
        SecretStr | None, Field(description="webhook that deploy has Prefect tell of failed runs and changes of champion")
    ] = None
    device: Annotated[str, Field(description="auto, cpu, cuda or cuda:1")] = "auto"
    workers: Annotated[int, Field(gt=0, description="stages that run at once, each in a process of its own")] = (
        os.cpu_count() or 1
    )
    threads: Annotated[int, Field(gt=0, description="threads of each stage; another number may round differently")] = 1
    processes: Annotated[
        int, Field(gt=0, description="processes of one training, each with its share of every batch; on CUDA one per GPU")
    ] = 1
    runner: Annotated[Runner, Field(description="where images are sampled, labelled, attacked and certified")] = "threads"
    cluster: Annotated[
        str | None, Field(validate_default=True, description="the cluster's address, where the runner is dask or ray")
    ] = None
    parts: Annotated[
        int | None, Field(gt=0, description="workers that share such a stage; not set: all that the cluster has room for, or 1")
    ] = None

    @field_validator("cluster")
    @classmethod
    def _fits_runner(cls, cluster: str | None, info: ValidationInfo) -> str | None:
        runner = info.data.get("runner", "threads")
        if runner == "threads":
            if cluster is not None:
                raise ValueError("has no effect while PROXYROB_RUNNER is threads; set that to dask or ray, or take this out")
        elif cluster is None or not _is_address(cluster, ADDRESS_SCHEMES[runner]):
            raise ValueError(f"expected the address of the cluster, {ADDRESSES[runner]}, because PROXYROB_RUNNER is {runner}")
        return cluster

    @property
    def store(self) -> Path:
        """Stage folders."""
        return self.home.absolute() / "store"

    def replace_data(self, uri: str) -> "Settings":
        """These settings with synthetic images at another place.

        Raises ``ValueError`` when that is no address of a store.
        """
        open_store(uri)
        return self.model_copy(update={"data": uri})

    @property
    def webhook(self) -> str | None:
        """Where people are notified.

        Raises ``ValueError`` for an address that is none, without showing it: it is a secret.
        """
        url = None if self.notify_url is None else self.notify_url.get_secret_value()
        if url is not None and not url.startswith(("https://", "http://")):
            raise ValueError("PROXYROB_NOTIFY_URL: expected the address of a webhook, https://…")
        return url

    @property
    def place(self) -> DataPlace:
        """Where synthetic images lie: samples of our proxies and published sets."""
        return DataPlace(self.data or str(self.store), self.home.absolute() / "cache", int(self.cache_gb * 1e9))

    @property
    def sets(self) -> DataPlace:
        """Where published sets lie, by name."""
        return self.place.below(PUBLISHED_SETS)

    @property
    def checkpoints(self) -> DataPlace | None:
        """Where copies of the checkpoints of a training lie: with the images, unless these lie in the store of stages."""
        return None if self.place.is_folder(self.store) else self.place

    @property
    def runs(self) -> Path:
        """Output folders of runs."""
        return self.home.absolute() / "runs"

    @property
    def measurements(self) -> Path:
        """Output folders of what was measured outside a run."""
        return self.home.absolute() / "measurements"

    @property
    def stack(self) -> Path:
        """State, logs and databases of the servers that ``proxyrob up`` starts."""
        return self.home.absolute() / "stack"

    @property
    def gpus(self) -> Path:
        """Which GPUs are taken, and by whom."""
        return self.home.absolute() / "gpus"

    @property
    def downloads(self) -> Path:
        """Data sets that were downloaded."""
        return self.home.absolute() / "downloads"

    @property
    def artifacts(self) -> Path:
        """MLflow's embedded artifact folder."""
        return self.home.absolute() / "mlflow" / "artifacts"

    @property
    def resolved_tracking_uri(self) -> str:
        """The MLflow server, or the embedded store."""
        return self.tracking_uri or self.embedded_tracking_uri

    @property
    def embedded_tracking_uri(self) -> str:
        """MLflow's SQLite file, at an absolute path."""
        return f"sqlite:///{self.home.absolute() / 'mlflow' / 'mlflow.db'}"


def hide_credentials(uri: str) -> str:
    """An address as it may be shown: without the name and password that it may carry."""
    return re.sub(r"//[^/@]*@", "//", uri)


def split_address(address: str) -> SplitResult:
    """Scheme, host and port of ``tcp://host:8786`` or ``host:6379``; ``port`` raises ``ValueError`` where it is no number."""
    return urlsplit(address if "://" in address else f"//{address}")


def _is_address(text: str, schemes: tuple[str, ...]) -> bool:
    parts = split_address(text)
    try:
        return parts.scheme in schemes and bool(parts.hostname) and parts.port is not None and not parts.path
    except ValueError:
        return False


PATIENT = {"PREFECT_CLIENT_MAX_RETRIES": "6", "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500"}
"""How long a run waits for Prefect's server, two minutes, also while that waits for its database: it answers 500 then."""


def prepare_environment(settings: Settings, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what Prefect and MLflow read when they are imported, unless the user has set it: call this before.

    Nothing phones home; Prefect's embedded files lie below our own folder. Raises
    ``PermissionError`` or ``NotADirectoryError`` when the home cannot be written.
    """
    defaults = {
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_HOME": str(settings.home.absolute() / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        **PATIENT,
        "MLFLOW_TRACKING_URI": settings.resolved_tracking_uri,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # a server that is away for longer is for flows.records.patience
        "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": "1",  # files of any size go to S3 past the server, where it offers that
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    for name, value in defaults.items():
        environment.setdefault(name, value)
    for folder in (Path(environment["PREFECT_HOME"]), settings.store, settings.runs, settings.artifacts):
        require_writable(folder)
