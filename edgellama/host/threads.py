"""Threads of torch while it measures the figures that a bundle keeps.

A sum shared by several threads is rounded differently for each number of threads. Such figures would depend
on the number of processors of the build machine. Measurements are therefore computed with one thread. If
there is enough work, whole work items run side by side (`Workers`), which changes no sum. The runtimes keep
their own thread pools. The kernels of XNNPACK and ONNX Runtime split a product by rows and columns of the
result, never within a sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch


class _Outside(threading.local):
    """Numbers of threads outside the open blocks of `one_thread`, outermost first. Torch keeps one per thread."""

    def __init__(self) -> None:
        self.counts: list[int] = []


_outside = _Outside()


@contextmanager
def one_thread() -> Iterator[None]:
    """Makes torch compute with one thread, in a block or, as a decorator, in a function."""
    _outside.counts.append(torch.get_num_threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_outside.counts.pop())


def available() -> int:
    """Number of threads that torch would use outside of any `one_thread`."""
    return _outside.counts[0] if _outside.counts else torch.get_num_threads()


Item = TypeVar("Item")


Result = TypeVar("Result")


class Workers:
    """Threads for work items. Each item uses one thread of torch, so that their number changes no sum."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results of `function` for every item, in order, without gradients."""

        def run(item: Item) -> Result:
            with torch.no_grad():
                return function(item)

        return self._pool.map(run, items)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Results of `function` for every item, in order. Each item uses one thread, as in `Workers`.

    >>> side_by_side(len, ["a", "bc"])
    [1, 2]
    """
    if len(items) < 2 or available() < 2:
        with one_thread(), torch.no_grad():
            return [function(item) for item in items]
    with workers() as pool:
        return list(pool.map(function, items))


@contextmanager
def workers() -> Iterator[Workers]:
    """Pool of as many threads as torch uses, for a block."""
    pool = Workers(available())
    with one_thread():
        try:
            yield pool
        finally:
            pool.close()
