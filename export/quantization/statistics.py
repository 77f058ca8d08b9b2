"""Second moments of what linears read, summed so that neither threads nor the order of the texts change a bit.

Each window is a work item of its own, computed by one thread in float32; the items' sums are added in float64 in the
order of the windows, which is the order of their contents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from edgellama.host.threads import available, one_thread

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Threads for work items. Inside each, torch computes with one thread: how many there are changes no sum."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`function` of every item, in order."""

        def run(item: Item) -> Result:
            with torch.no_grad():
                return function(item)

        return self._pool.map(run, items)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def workers() -> Iterator[Workers]:
    """As many threads as torch uses."""
    pool = Workers(available())
    with one_thread():
        try:
            yield pool
        finally:
            pool.close()


def second_moment(pool: Workers, inputs: Iterable[Tensor]) -> Tensor:
    """E[x x'] over all tokens: inputs float32 [T, n], one a window -> float64 [n, n]."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for product, tokens in pool.map(lambda x: (x.T @ x, len(x)), inputs):
        total, count = total + product.double(), count + tokens
    return total / count
