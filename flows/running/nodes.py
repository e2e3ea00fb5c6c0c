"""What is done on the nodes of a cluster. Prefect is not needed to look around there, and not imported."""

import os
import platform
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import current_process
from pathlib import Path
from secrets import token_hex
from typing import Any

from pydantic import ValidationError

from flows.running.fitting import largest_batch, run_fitting
from flows.running.workers import CHILDREN, warm_up
from flows.settings import Settings
from proxyrob.device import resolve_device
from proxyrob.storage import Report, open_store
from proxyrob.types import OnProgress

SAME_ON_ALL = ("proxyrob", "prefect", "torch")
PATIENCE_S = 5.0


@dataclass(frozen=True)
class Expected:
    """What every node has to have: the run's home, in which ``token`` lies, its images, its Prefect server, its packages."""

    home: Path
    token: Path
    data: str | None
    prefect_api: str
    versions: dict[str, str]


def describe_versions() -> dict[str, str]:
    """What has to be the same on all machines of a run."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in SAME_ON_ALL:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def look_around(expected: Expected) -> str | None:
    """What is wrong on this node, in words that say what to do, or ``None``."""
    checks = (_check_versions, _check_home, _check_settings, _check_data, _check_prefect)
    return next((problem for check in checks if (problem := check(expected)) is not None), None)


def call_on_node(
    function: Callable[..., Report],
    *,
    stage: Any,
    arguments: Mapping[str, Any],
    threads: int,
    on_progress: OnProgress,
    is_wanted: Callable[[], bool],
    note: Callable[[str], None],
) -> Report:
    """Call a library function in a child process of this node, on the node's own device (``PROXYROB_DEVICE``)."""
    current_process().daemon = False  # Dask's nanny makes its workers daemons, which may have no children; ours end with them
    # Dask and Ray set some of these for small tasks of their own
    os.environ.update(CHILDREN, OMP_NUM_THREADS=str(threads))
    warm_up(threads)
    return run_fitting(
        _call_on_device,
        largest=largest_batch(arguments),
        note=note,
        threads=threads,
        on_progress=on_progress,
        is_wanted=is_wanted,
        function=function,
        stage=stage,
        arguments=arguments,
        device=Settings().device,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def describe_unshared(folder: Path) -> str:
    """What to do where a node does not have a folder of the run."""
    return f"does not see {folder}: PROXYROB_HOME has to be a folder that all nodes share, at the same path on each of them"


def name_node() -> str:
    """This node, for people."""
    return f"{socket.gethostname()} (process {os.getpid()})"


def _call_on_device(
    function: Callable[..., Report],
    stage: Any,
    arguments: Mapping[str, Any],
    device: str,
    visible: str | None,
    on_progress: OnProgress,
) -> Report:
    """In the child: the GPUs are those that the cluster gave to this task, not those its fork server was started with."""
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    own = {"device": str(resolve_device(device))} if "device" in arguments else {}
    return function(stage=stage, on_progress=on_progress, **{**arguments, **own})


def _check_versions(expected: Expected) -> str | None:
    ours, theirs = describe_versions(), expected.versions
    differing = [f"{name} {ours[name]}, not {theirs[name]}" for name in theirs if ours[name] != theirs[name]]
    return f"has {', '.join(differing)}: install the same requirements.lock on all nodes" if differing else None


def _check_home(expected: Expected) -> str | None:
    if not expected.token.is_file():
        return describe_unshared(expected.home)
    try:
        own = expected.token.with_name(f"{expected.token.name}-{token_hex(4)}")
        own.write_bytes(b"")
        own.unlink()
    except OSError as error:
        return f"cannot write to {expected.home} ({error.strerror}): let the user that its processes run as write there"
    return None


def _check_settings(_expected: Expected) -> str | None:
    try:
        Settings()
    except ValidationError as error:
        fault = error.errors()[0]
        return f"has a wrong setting: PROXYROB_{str(fault['loc'][0]).upper()}: {fault['msg']}"
    return None


def _check_data(expected: Expected) -> str | None:
    if expected.data is not None:
        try:
            open_store(expected.data).stat("doctor")
        except OSError as error:
            return f"cannot read {expected.data} ({error}): give it the credentials of the store, which this machine has"
    return None


def _check_prefect(expected: Expected) -> str | None:
    try:
        with urllib.request.urlopen(f"{expected.prefect_api}/health", timeout=PATIENCE_S):  # noqa: S310  (the user's server)
            return None
    except urllib.error.HTTPError:  # it answers, if only to ask who we are
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return (
            f"does not reach Prefect's server at {expected.prefect_api} ({reason}): set PREFECT_API_URL to one that all nodes "
            "reach; a run without it has a server of its own, for its own machine alone"
        )
