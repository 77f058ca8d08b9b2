"""Runtime: feed tokens, get the logits after the last of them, with a KV cache that continues.

What all runtimes share lives here: the count of positions, the limit of the context, the check of token ids.
A runtime itself only runs its artifact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgellama.errors import ContextLengthError, UsageError
from edgellama.report import Check

Logits = npt.NDArray[np.float32]


class Runtime(ABC):
    """A model that runs. `position` is the number of tokens in the KV cache.

    name: what computes the numbers, as reports say it (`executorch-xnnpack`, `torch-reference`).
    """

    name: str
    vocab_size: int
    context_length: int
    position: int = 0

    @property
    def threads(self) -> int:
        """Threads that compute, where the runtime was not told a number."""
        return torch.get_num_threads()

    def forward(self, tokens: Sequence[int]) -> Logits:
        """Logits after the last of `tokens`: float32 [vocab_size]. The tokens join the KV cache.

        Raises ContextLengthError when they do not fit, UsageError for an id outside the vocabulary.
        """
        self._check(tokens)
        logits = self._forward(tokens, self.position)
        self.position += len(tokens)
        return logits

    def reset(self) -> None:
        """Forget all tokens: the next `forward` starts at position 0."""
        self.position = 0

    def forward_all(self, tokens: Sequence[int]) -> Tensor:
        """Logits after each of `tokens`: float32 [T, vocab_size]. The tokens join the KV cache.

        One call a token, as an app decodes, unless the runtime's artifact gives all rows of a longer call.
        """
        return torch.from_numpy(np.stack([self.forward([token]) for token in tokens]))

    def checks(self) -> list[Check]:
        """What the runtime itself noticed while it computed, as checks of the gate."""
        return []

    @abstractmethod
    def _forward(self, tokens: Sequence[int], position: int) -> Logits:
        """Logits after `tokens` at `position`, both already checked."""

    def close(self) -> None:
        """Release the model. A runtime that holds nothing but memory has nothing to do."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise UsageError("no tokens to run", remedy="Give at least one token id.")
        if self.position + len(tokens) > self.context_length:
            raise ContextLengthError(
                f"{self.position} tokens in the KV cache and {len(tokens)} more exceed the context of "
                f"{self.context_length}",
                remedy="Call reset(), feed fewer tokens, or export with a larger --context.",
            )
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= self.vocab_size:
            raise UsageError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {self.vocab_size}",
                remedy="Encode the text with the bundle's own tokenizer.",
            )
