"""Looks at a growing sample: the gate reads more text until a limit is decided, and errs no more often for it.

Every look is another chance to err. Looks therefore share the error that a single one would have. The first
look takes half of it, because it decides nearly always. The others divide the rest. The sum of the shares
bounds the error for any dependence of the looks (Bonferroni).
"""

from __future__ import annotations

from dataclasses import dataclass

from edgellama.gate.limits import ERROR

# Growth of the windows that makes another look worth its share of the error.
LEAST_GROWTH = 1.5


@dataclass(frozen=True)
class Look:
    """One look at the scored windows.

    Attributes:
        number: of this look, from 1.
        planned: number of looks that the text allows.
        windows: number of windows that are scored by then.
        error: probability of a wrong pass at this look, and of a wrong failure.
    """

    number: int
    planned: int
    windows: int
    error: float


def plan_looks(first: int, available: int) -> list[Look]:
    """Looks at `first` windows, twice as many, and so on up to all `available` ones.

    >>> [look.windows for look in plan_looks(16, 174)]
    [16, 32, 64, 174]
    >>> [look.error for look in plan_looks(16, 40)]
    [0.0125, 0.0125]
    """
    counts = [min(first, available)]
    while counts[-1] < available:
        doubled = 2 * counts[-1]
        counts.append(doubled if LEAST_GROWTH * doubled <= available else available)
    share = [ERROR] if len(counts) == 1 else [ERROR / 2, *[ERROR / 2 / (len(counts) - 1)] * (len(counts) - 1)]
    return [
        Look(number, len(counts), windows, error)
        for number, (windows, error) in enumerate(zip(counts, share, strict=True), start=1)
    ]
