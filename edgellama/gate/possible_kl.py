"""Bounds on a KL that no distribution can break: they follow from the recorded probabilities of one position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellama.bundle.golden import Expectation, Float
from edgellama.gate import limits


def least_kl_of_change(recorded: Expectation, row: int, best: int | None) -> float:
    """Least KL D(recorded || d), nats, of any distribution d whose most probable token is another.

    best: that token; None for any other.

    The cheapest such d gives both tokens the mean of their probabilities.
    """
    first = math.exp(recorded.logp[row, 0])
    places = np.flatnonzero(recorded.ids[row] == best) if best is not None else np.array([1])
    # A token that is not recorded has at most the probability of the last one that is.
    place = min(int(places[0]) if len(places) else recorded.ids.shape[1] - 1, recorded.ids.shape[1] - 1)
    second = math.exp(recorded.logp[row, place])
    if place == 0 or second >= first:
        return 0.0
    middle = (first + second) / 2
    return first * math.log(first / middle) + (second * math.log(second / middle) if second else 0.0)


@dataclass(frozen=True)
class Pair:
    """One position: what the reference and the host's artifact said, over the buckets that both recorded.

    Attributes:
        reference, host: probabilities of the tokens that both recorded, and of all others together.
        hidden: probability that the reference gives to tokens of which the host recorded none.
    """

    reference: Float
    host: Float
    hidden: float

    @classmethod
    def of(cls, reference: Expectation, host: Expectation, row: int) -> Pair:
        _, ours, theirs = np.intersect1d(reference.ids[row], host.ids[row], return_indices=True)
        return cls(
            _merged(reference, row, ours),
            _merged(host, row, theirs),
            float(np.exp(np.delete(reference.logp[row].astype(np.float64), ours)).sum()),
        )

    @property
    def kl(self) -> float:
        """KL D(reference || host), nats: at most what the host measured over all buckets of the reference."""
        return _kl(self.reference, self.host)

    def least_kl(self, parity: float) -> float:
        """Least KL D(reference || d), nats, of any distribution d with D(host || d) <= `parity`.

        The minimum lies on the line between both distributions (Lagrange).
        """
        allowed = parity * (1 + limits.DEVICE_KL_ERROR) + limits.DEVICE_KL_ZERO
        low, high = 0.0, 1.0  # share of the host in the mixture
        if _kl(self.host, self.reference) <= allowed:
            return 0.0
        for _ in range(40):
            middle = (low + high) / 2
            if _kl(self.host, self._mixture(middle)) <= allowed:
                high = middle
            else:
                low = middle
        return _kl(self.reference, self._mixture(low))

    def spread(self, parity: float) -> float:
        """Difference to the host's own KL that noise of this `parity` explains, nats (Cauchy and Schwarz)."""
        if parity == 0:
            return 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(self.reference > 0, self.reference**2 / self.host, 0.0)
        return float(parity + limits.DEVICE_SPREAD * math.sqrt(2 * parity * ratio.sum()))

    def _mixture(self, share: float) -> Float:
        mixture: Float = share * self.host + (1 - share) * self.reference
        return mixture


def _merged(recorded: Expectation, row: int, places: Any) -> Float:
    kept = np.exp(recorded.logp[row, places].astype(np.float64))
    others = np.exp(np.delete(recorded.logp[row].astype(np.float64), places)).sum()
    return np.append(kept, others + math.exp(recorded.rest[row]))


def _kl(p: Float, q: Float) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / q), 0.0)
    return max(0.0, float(terms.sum()))
