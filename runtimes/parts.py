"""Runtimes that also return the input of every layer, computed by the parts of the shipped file.

Each layer can then be compared on its own, with the hidden states that the file itself feeds it. Noise of
other layers is not in that comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

LONGEST = 32  # tokens of a call


@dataclass(frozen=True)
class States:
    """Values of one call.

    Attributes:
        inputs: hidden states before each layer, float32 [T, hidden_size].
        logits: after the last token, float32 [vocab_size].
    """

    inputs: list[Tensor]
    logits: Tensor

    @property
    def count(self) -> int:
        """T, the number of tokens that the call took."""
        return len(self.inputs[0])


class PartsRuntime(Protocol):
    """Runs a file and returns its hidden states. The KV cache continues from call to call."""

    def states(self, tokens: Sequence[int]) -> States:
        """Runs one call with the first of up to `LONGEST` tokens: all of them, or as many as a call takes."""

    def reset(self) -> None: ...

    def close(self) -> None: ...
