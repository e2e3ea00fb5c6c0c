"""Whether a cluster can be reached at all: asked before Prefect is imported, so that wrong settings are refused at once."""

import socket
from importlib.util import find_spec

from flows.settings import Settings, split_address

CONNECT_S = 10.0
EXTRAS = {"dask": "prefect_dask", "ray": "prefect_ray"}


def require_cluster(settings: Settings) -> None:
    """Raise ``ValueError`` when the extra that the runner needs is not installed, ``ConnectionError`` when nobody listens."""
    if settings.runner == "threads":
        return
    if find_spec(EXTRAS[settings.runner]) is None:
        raise ValueError(
            f"PROXYROB_RUNNER={settings.runner} needs more packages: install proxyrob[{settings.runner}] here and on every node"
        )
    assert settings.cluster is not None  # the settings see to it
    parts = split_address(settings.cluster)
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=CONNECT_S).close()
    except OSError as error:
        raise ConnectionError(
            f"nobody answers at {settings.cluster} ({error.strerror or error}): start the cluster, or correct PROXYROB_CLUSTER"
        ) from error
