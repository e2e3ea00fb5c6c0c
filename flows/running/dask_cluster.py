"""A Dask cluster whose workers share stages. It needs the extra ``dask``."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from dask.base import annotate
from prefect.futures import PrefectWrappedFuture
from prefect_dask.task_runners import DaskTaskRunner

from flows.running.cluster import Cluster, Node
from flows.running.reachable import CONNECT_S

GPU = "GPU"
"""The resource that a worker announces (``dask worker --resources GPU=1``) when its tasks may use a GPU each."""


class DaskCluster(Cluster):
    """Each thread of a Dask worker has room for one of our workers; where some announce GPUs, each GPU has."""

    runner: DaskTaskRunner

    def nodes(self) -> list[Node]:
        workers = self._workers()
        rooms = {address: worker["resources"].get(GPU, 0) for address, worker in workers.items()}
        if not any(rooms.values()):
            rooms = {address: worker["nthreads"] for address, worker in workers.items()}
        return [Node(_name(address, workers[address]), int(room)) for address, room in rooms.items() if room]

    def placing(self) -> AbstractContextManager[Any]:
        has_gpus = any(worker["resources"].get(GPU) for worker in self._workers().values())
        return annotate(resources={GPU: 1}) if has_gpus else nullcontext()

    def cancel(self, future: PrefectWrappedFuture[Any, Any]) -> None:
        future.wrapped_future.cancel()

    def ask_each(self, question: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        workers = self._workers()
        answers: Any = self.runner.client.run(question, *arguments, on_error="return")
        return {_name(address, workers.get(address, {})): answer for address, answer in answers.items()}

    def _workers(self) -> dict[str, dict[str, Any]]:
        return self.runner.client.scheduler_info()["workers"]


@contextmanager
def connect_dask(address: str, parts: int | None) -> Iterator[Cluster]:
    """Connect to a scheduler. Raises ``ConnectionError`` when it does not answer as one."""
    logging.getLogger("distributed").setLevel(logging.ERROR)  # it tells of every connection
    runner = DaskTaskRunner(address=address, client_kwargs={"timeout": CONNECT_S})
    with runner:
        try:
            runner.client  # noqa: B018  (it connects when it is read)
        except OSError as error:
            raise ConnectionError(
                f"no Dask scheduler answers at {address} ({error}): correct PROXYROB_CLUSTER, or PROXYROB_RUNNER"
            ) from error
        yield DaskCluster(runner, parts)


def _name(address: str, worker: dict[str, Any]) -> str:
    name = str(worker.get("name", address))
    return address if name == address else f"{name} ({address})"
