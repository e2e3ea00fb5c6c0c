"""Memory that runs out: the same work again, with fewer images at once."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flows.running.workers import run_in_child
from proxyrob.errors import OutOfMemory

T = TypeVar("T")

USUAL = 256
"""How many images a stage takes to have had at once whose arguments do not say it."""


def run_fitting(function: Callable[..., T], /, *, largest: int, note: Callable[[str], None], **given: Any) -> T:
    """``run_in_child``, and again with half as many images at once, beginning from ``largest``, whenever memory runs out.

    What a stage has finished by then it does not do again. The results are the same to rounding, and the stage's record says
    how many images were held. ``note`` is told of each attempt. Raises ``OutOfMemory`` when there is no room for one image, and
    what ``run_in_child`` raises.
    """
    limit: int | None = None
    while True:
        try:
            return run_in_child(function, at_once=limit, **given)
        except OutOfMemory as error:
            before = largest if limit is None else limit
            if before == 1:
                raise OutOfMemory(f"{error}; there is no room for one image: end what else uses this memory") from error
            limit = before // 2
            note(f"{error}: goes on with at most {limit} of {largest} images at once")


def largest_batch(arguments: Mapping[str, Any]) -> int:
    """How many images a stage holds at once when nothing limits it."""
    configs = [arguments.get(name) for name in ("config", "sampling")]
    sizes = [getattr(config, name, None) for config in configs for name in ("micro_batch", "batch_size")]
    return next((size for size in sizes if isinstance(size, int)), USUAL)
