"""A Ray cluster whose nodes share stages. It needs the extra ``ray``."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import grpc
import ray
from prefect.futures import PrefectWrappedFuture
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flows.running.cluster import Cluster, Node
from flows.running.reachable import CONNECT_S

ANSWER_S = 60.0
"""How long a node has to answer a question: its first task starts a Python there."""


class RayCluster(Cluster):
    """Each CPU of a node has room for one worker of one thread; where some nodes have GPUs, each GPU has."""

    def __init__(self, runner: RayTaskRunner[Any], parts: int | None, threads: int) -> None:
        super().__init__(runner, parts)
        self.threads = threads

    def nodes(self) -> list[Node]:
        return [Node(_name(node), room) for node, room in self._rooms()]

    def placing(self) -> AbstractContextManager[Any]:
        gpus = {"num_gpus": 1} if any(_count(node, "GPU") for node, _ in self._rooms()) else {}
        return remote_options(num_cpus=self.threads, **gpus)

    def cancel(self, future: PrefectWrappedFuture[Any, Any]) -> None:
        ray.cancel(future.wrapped_future)

    def ask_each(self, question: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        asked = {}
        for node, _ in self._rooms():
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[_name(node)] = ray.remote(question).options(num_cpus=0, scheduling_strategy=strategy).remote(*arguments)
        answers: dict[str, Any] = {}
        for name, reference in asked.items():
            try:
                answers[name] = ray.get(reference, timeout=ANSWER_S)
            except Exception as error:  # whatever keeps a node from answering is its answer
                answers[name] = error
        return answers

    def _rooms(self) -> list[tuple[dict[str, Any], int]]:
        """The nodes that take workers, and how many at once."""
        alive = [node for node in ray.nodes() if node["Alive"]]
        rooms = [(node, _count(node, "CPU") // self.threads) for node in alive]
        if any(_count(node, "GPU") for node in alive):
            rooms = [(node, min(room, _count(node, "GPU"))) for node, room in rooms]
        return [(node, room) for node, room in rooms if room]


@contextmanager
def connect_ray(address: str, parts: int | None, threads: int) -> Iterator[Cluster]:
    """Connect to a cluster. Raises ``ConnectionError`` when it does not answer as one."""
    _require_grpc(address)
    logging.getLogger("ray.client_builder").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False}
    if "://" not in address:
        options["logging_level"] = logging.ERROR
    runner: RayTaskRunner[Any] = RayTaskRunner(address, init_kwargs=options)
    before = signal.getsignal(signal.SIGTERM)
    with ExitStack() as stack:
        try:
            stack.enter_context(runner)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise ConnectionError(
                f"the Ray cluster at {address} does not let us in ({error}): correct PROXYROB_CLUSTER, or give the cluster's "
                "token in RAY_AUTH_TOKEN"
            ) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own handler would end this process at once
        yield RayCluster(runner, parts, threads)


def _require_grpc(address: str) -> None:
    """Raise ``ConnectionError`` when another program than a Ray cluster listens there: Ray would ask it for minutes."""
    if os.environ.get("RAY_USE_TLS") == "1":
        return
    with grpc.insecure_channel(address.removeprefix("ray://")) as channel:
        try:
            grpc.channel_ready_future(channel).result(CONNECT_S)
        except grpc.FutureTimeoutError as error:
            raise ConnectionError(
                f"what listens at {address} is no Ray cluster: correct PROXYROB_CLUSTER or PROXYROB_RUNNER"
            ) from error


def _count(node: dict[str, Any], resource: str) -> int:
    return int(node["Resources"].get(resource, 0))


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
