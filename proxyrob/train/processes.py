"""One training in several processes: which of them this is, and what they tell each other."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that train one classifier together, each on its share of every batch, as one of them sees them.

    All call the same methods in the same order, and each call returns when all have made it. Tensors go over the backend of
    torch's default group; what the processes say to each other goes over ``hosts``, a gloo group, and waits for no GPU.
    Where there is one process alone, nothing is done.
    """

    rank: int = 0
    count: int = 1
    hosts: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type by their means over the processes; all processes get the same bits."""
        if self.count > 1:
            flat = _flatten(tensors)
            dist.all_reduce(flat)
            _copy_back(flat / self.count, tensors)

    def follow_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type by those of the first process."""
        if self.count > 1 and tensors:
            flat = _flatten(tensors)
            dist.broadcast(flat, src=0)
            _copy_back(flat, tensors)

    def total(self, *counts: int) -> list[int]:
        """The sums of counts over the processes."""
        return [sum(column) for column in zip(*self.all_values(counts), strict=True)]

    def any(self, claim: bool) -> bool:
        """Whether the claim is true of one of the processes."""
        if self.count == 1:
            return claim
        flag = torch.tensor(int(claim))
        dist.all_reduce(flag, dist.ReduceOp.MAX, self.hosts)
        return bool(flag)

    def all_values(self, value: T) -> list[T]:
        """The value of each process, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, self.hosts)
        return values

    def from_first(self, value: T) -> T:
        """The value of the first process."""
        return self.all_values(value)[0]

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            dist.barrier(self.hosts)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The other processes enter the block when the first has left it."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def open_store(self) -> Store:
        """Keys and values that all processes see, of their own for every call. It is read without waiting for anyone."""
        return PrefixStore(f"proxyrob/{self.from_first(uuid4().hex)}", _get_default_store())


ALONE = Processes()


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """The processes of torch's default group where there is one, else this process alone."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield ALONE
        return
    hosts = dist.new_group(backend="gloo")
    assert isinstance(hosts, dist.ProcessGroup)  # of which all processes are members
    yield Processes(dist.get_rank(), dist.get_world_size(), hosts)
    dist.destroy_process_group(hosts)  # after an error it stays: the others see it break when this process ends, not before


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _copy_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
