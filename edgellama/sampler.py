"""Sampler: logits to the next token. Greedy at temperature 0, else nucleus sampling with a seed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from edgellama.errors import UsageError
from edgellama.runtimes.base import Logits


@dataclass
class Sampler:
    """Draws the next token.

    temperature: 0 is greedy (the lowest id among equals). top_p: the smallest set of tokens whose probability
    reaches it is kept (Holtzman et al. 2020). seed: same seed, same tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    _generator: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UsageError(
                f"temperature must lie in [0, 100], got {self.temperature}", remedy="0 is greedy."
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must lie in (0, 1], got {self.top_p}", remedy="1 keeps every token.")
        if self.seed < 0:
            raise UsageError(f"seed must not be negative, got {self.seed}", remedy="Give 0 or more.")
        self._generator = np.random.default_rng(self.seed)

    def __call__(self, logits: Logits) -> int:
        """The next token id for logits float32 [vocab_size]."""
        if self.temperature == 0:
            return int(logits.argmax())
        below = logits.astype(np.float64) - logits.max()
        with np.errstate(over="ignore"):  # minus infinity is what a very low temperature means
            probabilities = np.exp(below / self.temperature)
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        cumulative = np.cumsum(probabilities[order])
        kept = order[: int(np.searchsorted(cumulative, self.top_p)) + 1]
        weights = probabilities[kept] / probabilities[kept].sum()
        return int(self._generator.choice(kept, p=weights))
