"""How requests to S3 follow each other: several beside each other, and one after another with a delay."""

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = 10  # parts or ranges of one object under way at once
MAX_DELAY_S = 20.0  # between two attempts: a random part of 1, 2, 4, … seconds, at most this

T = TypeVar("T")
U = TypeVar("U")


def beside_each_other(work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """``work`` of every item, in their order, on several threads; no more are taken up than are under way."""
    under_way: deque[Future[U]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for item in items:
                under_way.append(pool.submit(work, item))
                if len(under_way) > THREADS:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


def wait(attempt: int) -> None:
    """As botocore does between requests, so that clients which failed together do not come back together."""
    time.sleep(random.uniform(0, min(2.0 ** (attempt - 1), MAX_DELAY_S)))  # noqa: S311 - no secret
