"""Sampler: logits to the next token. Greedy at temperature 0, else nucleus sampling with a seed.

The Android and iOS cores use the same steps in the same order. A seed therefore gives the same tokens there
(tests/vectors/sampling.json). The generators of numpy are not used: their numbers may change between
versions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from edgellama.errors import UsageError
from edgellama.runtimes.base import Logits

_MASK = (1 << 64) - 1


class Random:
    """SplitMix64 (Steele, Lea, Flood 2014): 64 bits of state, the same sequence in every language."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def next(self) -> int:
        """Returns 64 random bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def uniform(self) -> float:
        """Returns a number in [0, 1): the upper 53 bits of `next`."""
        return (self.next() >> 11) * 2.0**-53


@dataclass
class Sampler:
    """Draws the next token.

    temperature: 0 is greedy (the lowest id among equals). top_p: keeps the smallest set of tokens whose
    probability reaches it (Holtzman et al. 2020). seed: equal seeds give equal tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    _random: Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UsageError(
                f"temperature must lie in [0, 100], got {self.temperature}", remedy="0 is greedy."
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must lie in (0, 1], got {self.top_p}", remedy="1 keeps every token.")
        if not 0 <= self.seed <= _MASK:
            raise UsageError(f"seed must lie in [0, 2^64), got {self.seed}", remedy="Give a number in there.")
        self._random = Random(self.seed)

    def __call__(self, logits: Logits) -> int:
        """Returns the next token id for logits float32 [vocab_size]."""
        if self.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")  # lower id first among equals
        below = logits[order].astype(np.float64) - float(logits[order[0]])
        with np.errstate(over="ignore"):  # a very low temperature gives minus infinity, as intended
            cumulative = np.cumsum(np.exp(below / self.temperature))
        last = int(np.searchsorted(cumulative, self.top_p * cumulative[-1]))
        drawn = self._random.uniform() * cumulative[last]
        return int(order[min(int(np.searchsorted(cumulative, drawn, side="right")), last)])
