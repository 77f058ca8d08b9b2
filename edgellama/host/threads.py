"""How many threads torch computes with, where figures are measured that a bundle keeps.

A sum that several threads share is rounded another way for each number of threads, so such figures would say how many
processors the build machine had. What is measured is therefore computed with one thread; where there is enough to do,
whole work items run side by side instead (`edgellama.export.quantization.statistics.Workers`), which changes no sum. The runtimes
keep their own thread pools: XNNPACK's and ONNX Runtime's kernels cut a product by rows and columns of the result and
never within a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_outside: list[int] = []  # numbers of threads outside the blocks of `one_thread` that we are in


@contextmanager
def one_thread() -> Iterator[None]:
    """A block, or as a decorator a function, in which torch computes with one thread."""
    _outside.append(torch.get_num_threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_outside.pop())


def available() -> int:
    """How many threads torch would use outside of any `one_thread`."""
    return _outside[0] if _outside else torch.get_num_threads()


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
