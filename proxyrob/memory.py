"""How many images a piece of work holds in memory at once.

A means of computing, as the number of threads is: no result depends on it but by rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import overload

import torch

from proxyrob.errors import OutOfMemory

MESSAGES = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says when an allocator of the host or a library of the device gets no memory, of no type of its own."""
ONEDNN = ("could not create a primitive", "could not create a memory object")
"""The whole of what it says when oneDNN, which does the convolutions on the CPU, gets none."""

_limit: ContextVar[int | None] = ContextVar("limit", default=None)


@contextmanager
def hold_at_once(limit: int | None) -> Iterator[None]:
    """Let this thread hold at most ``limit`` images of a batch at once inside the block; without a limit, all of it.

    Raises ``ValueError`` unless that is at least one, and ``OutOfMemory`` for whatever says inside that memory ran out.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"expected at least one image at once, got {limit}")
    token = _limit.set(limit)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"memory ran out ({' '.join(str(error).split())[:200] or type(error).__name__})") from error
    finally:
        _limit.reset(token)


def held_at_once() -> int | None:
    """The limit of this thread, or ``None``."""
    return _limit.get()


@overload
def at_most(size: int) -> int: ...
@overload
def at_most(size: None) -> int | None: ...
@overload
def at_most(size: int | None) -> int | None: ...
def at_most(size: int | None) -> int | None:
    """``size`` images at once, or fewer where this thread has a limit; ``None``: all of a batch."""
    limit = _limit.get()
    return limit if size is None else size if limit is None else min(size, limit)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, that of a GPU or the host's."""
    if isinstance(error, OutOfMemory | MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (text in ONEDNN or any(message in text for message in MESSAGES))
