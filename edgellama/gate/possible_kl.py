"""Bounds on a KL that no distribution can break: they follow from the recorded probabilities of one position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellama.bundle.golden import Expectation, Float
from edgellama.gate import limits

_SHARE_ERROR = 2.0**-40  # of the host's share in a mixture
_MOST_STEPS = 100  # a share that begins at 2^-40 at most doubles in a step, and then few more follow


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
        at_the_reference = _kl(self.host, self.reference)
        if at_the_reference <= allowed:
            return 0.0
        seen = self.host > 0
        host, reference = self.host[seen], self.reference[seen]
        # D(host || mixture) is convex in the host's share. Newton's steps from the left therefore never pass the root.
        share = 0.0 if math.isfinite(at_the_reference) else _SHARE_ERROR
        for _ in range(_MOST_STEPS):
            mixture = share * host + (1 - share) * reference
            excess = float((host * np.log(host / mixture)).sum()) - allowed
            step = excess / float((host * (host - reference) / mixture).sum())
            if not step > _SHARE_ERROR:
                break
            share += step
        return _kl(self.reference, share * self.host + (1 - share) * self.reference)

    def spread(self, parity: float) -> float:
        """Difference to the host's own KL that noise of this `parity` explains, nats (Cauchy and Schwarz)."""
        if parity == 0:
            return 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(self.reference > 0, self.reference**2 / self.host, 0.0)
        return float(parity + limits.DEVICE_SPREAD * math.sqrt(2 * parity * ratio.sum()))


def _merged(recorded: Expectation, row: int, places: Any) -> Float:
    kept = np.exp(recorded.logp[row, places].astype(np.float64))
    others = np.exp(np.delete(recorded.logp[row].astype(np.float64), places)).sum()
    return np.append(kept, others + math.exp(recorded.rest[row]))


def _kl(p: Float, q: Float) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / q), 0.0)
    return max(0.0, float(terms.sum()))
