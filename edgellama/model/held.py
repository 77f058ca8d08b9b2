"""Converted weights that are held for a while, where several small inputs pass through the same layer.

A quantized linear converts its codes to float32 at each call, so that no float copy stays in memory. For a few
tokens this costs more than the product. Inside `holding` each weight is converted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

# Owners are kept beside their tensors, because a freed object's id may be given to another.
_held: list[dict[int, tuple[object, Tensor]]] = []


@contextmanager
def holding() -> Iterator[None]:
    """Context in which `converted` returns the same tensor for the same owner."""
    _held.append({})
    try:
        yield
    finally:
        _held.pop()


def converted(owner: object, convert: Callable[[], Tensor]) -> Tensor:
    """Result of `convert`, which callers may not change. Inside `holding` it is computed once for each owner.

    >>> codes = Tensor([1, 2])
    >>> with holding():
    ...     converted(codes, codes.double) is converted(codes, codes.double)
    True
    """
    if not _held:
        return convert()
    known = _held[-1]
    if id(owner) not in known:
        known[id(owner)] = owner, convert()
    return known[id(owner)][1]
