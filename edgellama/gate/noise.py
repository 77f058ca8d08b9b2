"""Noise of a correct run: the distribution that single calls of an artifact are judged by.

The KL between two correct runs has a heavy tail. With int8 activations most positions differ by nothing, and
a few by a thousand times the mean, because one rounding flipped. A mean over few positions is therefore no
statistic to judge by. Two others are, each against its own largest value over some hundred positions of noise:

- the largest KL of a single position;
- the largest geometric mean of a few positions in a row, which one flipped rounding cannot raise. A lost token
  or a wrong KV cache raises it, since all later positions are wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

from edgellama.gate.limits import ASSUMED_TAIL, parity_limit
from edgellama.model.layerwise import Float

RUN = 4  # positions in a row
_LEAST = 1e-12  # nats; keeps the logarithm finite for equal logits


def geometric_mean(kl: Float) -> float:
    """Geometric mean of KL values, nats. NaN if one is.

    >>> round(geometric_mean(np.array([1e-4, 1e-2])), 6)
    0.001
    """
    return float(np.exp(np.log(np.maximum(kl, _LEAST)).mean()))


def geometric_spread(kl: Float) -> float:
    """Standard deviation of the logarithms of KL values."""
    return float(np.log(np.maximum(kl, _LEAST)).std())


@dataclass(frozen=True)
class Noise:
    """Largest values among positions that differ by noise alone, KL in nats.

    Attributes:
        position: of one position.
        run: of the geometric mean of `RUN` positions in a row.
    """

    position: float
    run: float

    @classmethod
    def of(cls, windows: Iterable[Float]) -> Self:
        """Noise of positions in a row: float64 [T] for each window."""
        runs = [kl[i : i + RUN] for kl in windows for i in range(0, len(kl), RUN)]
        return cls(
            float(np.max([run.max() for run in runs])),
            float(np.max([geometric_mean(run) for run in runs if len(run) == RUN] or [0.0])),
        )

    @classmethod
    def assumed(cls, mean: float) -> Self:
        """Noise of which only the mean is assumed, nats."""
        return cls(ASSUMED_TAIL * mean, mean)

    def joined(self, other: Noise) -> Noise:
        """Noise of the positions of both."""
        return Noise(max(self.position, other.position), max(self.run, other.run))

    def limits(self, always_passes: float) -> Noise:
        """Largest values that pass. always_passes: KL that always passes, nats."""
        return Noise(parity_limit(self.position, always_passes), parity_limit(self.run, always_passes))


def worst(values: Iterable[float]) -> float:
    """Largest value, NaN if one is, 0 if there is none."""
    return float(np.max([0.0, *values]))
