"""A function of many tasks, by worker processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from data import DataError

T = TypeVar("T")


def results(function: Callable[..., T], tasks: Sequence[tuple[Any, ...]], workers: int) -> Iterator[T]:
    """What a function of each task returns, in their order.

    Worker processes are spawned: libraries that were opened before a fork hang after it.

    Raises:
        DataError: a worker died.
    """
    if workers == 1 or len(tasks) < 2:
        yield from (function(*task) for task in tasks)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(function, *zip(*tasks, strict=True))
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died (often for lack of memory). Run the same command again, with fewer --workers; what "
                "is done is kept."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
