"""Who shares the stages of a run: threads of this machine, or the nodes of a Dask or Ray cluster, as the environment says."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from prefect.futures import PrefectWrappedFuture
from prefect.settings import PREFECT_API_URL
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.running.fan_out import Crew
from flows.running.nodes import Expected, describe_versions, look_around
from flows.running.reachable import require_cluster
from flows.settings import Settings

START_NODE = {"dask": "start one with 'dask worker ADDRESS'", "ray": "start one with 'ray start --address=HEAD:6379'"}


@dataclass(frozen=True)
class Node:
    """A node, as people call it, and how many workers it takes at once."""

    name: str
    room: int


class Cluster(ABC):
    """A crew on other machines. ``parts`` are the workers that share a stage; without it as many as there is room for."""

    is_remote = True

    def __init__(self, runner: TaskRunner[Any], parts: int | None) -> None:
        self.runner = runner
        self.parts = parts

    def size(self) -> int:
        room = sum(node.room for node in self.nodes())
        return (self.parts or room) if room else 0

    def describe(self) -> str:
        nodes = self.nodes()
        return f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}, {self.size()} workers for each stage that can be shared"

    @abstractmethod
    def nodes(self) -> list[Node]:
        """Those that take workers."""

    @abstractmethod
    def ask_each(self, question: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """What ``question`` returns on each node that takes workers, or raises, by the name of the node."""

    @abstractmethod
    def placing(self) -> AbstractContextManager[Any]:
        """As ``Crew`` has it."""

    @abstractmethod
    def cancel(self, future: PrefectWrappedFuture[Any, Any]) -> None:
        """As ``Crew`` has it."""


class Threads:
    """Several workers on this machine, each in a process of its own as long as there is one free."""

    is_remote = False

    def __init__(self, runner: ThreadPoolTaskRunner[Any], size: int) -> None:
        self.runner = runner
        self._size = size

    def size(self) -> int:
        return self._size

    def describe(self) -> str:
        return f"{self._size} workers on this machine for each stage that can be shared"

    def placing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def cancel(self, future: PrefectWrappedFuture[Any, Any]) -> None:
        """It is not begun once it gets a process, because it is not wanted any more."""


@contextmanager
def enter_crew(settings: Settings) -> Iterator[Crew | None]:
    """The crew that the settings ask for; ``None`` where a stage is done by one worker on this machine.

    Raises ``ConnectionError`` or ``RuntimeError`` when the cluster does not answer, has no nodes, or has one on which the work
    would fail.
    """
    if settings.runner == "threads":
        if settings.parts in {None, 1}:
            yield None
            return
        with ThreadPoolTaskRunner() as runner:
            yield Threads(runner, settings.parts or 1)
        return
    with connect(settings) as cluster:
        if not cluster.nodes():
            raise RuntimeError(f"the cluster at {settings.cluster} has no node that takes work: {START_NODE[settings.runner]}")
        problems = inspect_nodes(cluster, settings, PREFECT_API_URL.value() or "")
        if problems:
            name, problem = next(iter(problems.items()))
            others = f" (and so on, {len(problems)} nodes in all)" if len(problems) > 1 else ""
            raise RuntimeError(f"node {name} of the cluster {problem}{others}")
        yield cluster


@contextmanager
def connect(settings: Settings) -> Iterator[Cluster]:
    """The cluster of the settings. Raises ``ConnectionError`` when it does not answer."""
    require_cluster(settings)
    assert settings.cluster is not None  # the settings see to it
    if settings.runner == "dask":
        from flows.running.dask_cluster import connect_dask

        with connect_dask(settings.cluster, settings.parts) as cluster:
            yield cluster
    else:
        from flows.running.ray_cluster import connect_ray

        with connect_ray(settings.cluster, settings.parts, settings.threads) as cluster:
            yield cluster


def inspect_nodes(cluster: Cluster, settings: Settings, prefect_api: str) -> dict[str, str]:
    """What is wrong on which node of a cluster, by the node's name."""
    token = settings.store / f".seen-{token_hex(4)}"
    token.write_bytes(b"")
    try:
        expected = Expected(settings.home.absolute(), token, settings.data, prefect_api, describe_versions())
        answers = cluster.ask_each(look_around, expected)
    finally:
        token.unlink()
    return {
        name: f"cannot do our work ({answer})" if isinstance(answer, BaseException) else answer
        for name, answer in answers.items()
        if answer is not None
    }
