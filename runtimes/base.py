"""Base class of runtimes: takes tokens, returns the logits after the last of them, keeps a KV cache.

Shared by all runtimes: the position, the context limit, the check of token ids. A subclass only runs its
artifact.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgellama.errors import ContextLengthError, UsageError
from edgellama.host.torch_defaults import check_torch_defaults
from edgellama.model.guard import Message
from edgellama.report import Check

if TYPE_CHECKING:
    from edgellama.runtimes.classify import Classification, TextClassifier

Logits = npt.NDArray[np.float32]


class OwnTokenizer(Protocol):
    """Tokenizer of a runtime whose artifact holds one."""

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of a text. add_special: with the tokens that every text gets."""

    def ends(self) -> list[int]:
        """Ids at which the runtime's own loop ends an answer."""


class Runtime(ABC):
    """A loaded model. `position` is the number of tokens in the KV cache.

    name: the runtime's name in reports (`executorch-xnnpack`, `torch-reference`).

    >>> import edgellama
    >>> with edgellama.load(bundle) as runtime:
    ...     prefill = runtime.forward([1, 2, 3])
    ...     decode = runtime.forward([int(prefill.argmax())])
    ...     runtime.position
    4
    """

    name: str
    vocab_size: int
    context_length: int
    position: int = 0
    _output_size: int | None = None  # logits of a position, where the artifact says
    text_classifier: TextClassifier | None = None  # of a bundle that classifies texts
    can_rewind: ClassVar[bool] = False  # whether the KV cache can be cut back
    cache_is_input: ClassVar[bool] = False  # whether keys and values can be read and set
    cached: tuple[int, ...] = ()  # tokens in the KV cache since the last reset, as far as known
    adapter: str | None = None  # name of the adapter in use
    adapters: Mapping[str, Path] = MappingProxyType({})  # files by name, verified

    @property
    def threads(self) -> int:
        """Number of compute threads when the caller sets none."""
        return torch.get_num_threads()

    @property
    def output_size(self) -> int:
        """Number of logits of a position: of the vocabulary, or of a classifier's rows."""
        return self.vocab_size if self._output_size is None else self._output_size

    def forward(self, tokens: Sequence[int]) -> Logits:
        """Returns the logits after the last of `tokens`: float32 [output_size]. The tokens join the KV cache.

        Raises ContextLengthError if they do not fit, UsageError for no tokens or an id outside the
        vocabulary.
        """
        tokens = self._checked(tokens)
        logits = self._forward(tokens, self.position)
        known = len(self.cached) >= self.position
        self.cached = (*self.cached[: self.position], *tokens) if known else ()
        self.position += len(tokens)
        return logits

    def reset(self) -> None:
        """Forget all tokens: the next `forward` starts at position 0."""
        self.position, self.cached = 0, ()

    def rewind(self, position: int) -> None:
        """Forgets all but the first `position` tokens of `cached`.

        Raises UsageError for a runtime that cannot, and for tokens that are not in the cache.
        """
        if not self.can_rewind or not 0 < position <= len(self.cached):
            raise UsageError(
                f"{self.name} cannot go back to position {position}: {len(self.cached)} tokens are known",
                remedy="Call reset(), and feed the tokens again.",
            )
        self._rewind(position)
        self.position, self.cached = position, self.cached[:position]

    def _rewind(self, position: int) -> None:
        """Cuts the KV cache back. Nothing to do where positions mask it."""
        return

    def cache(self, count: int) -> dict[str, npt.NDArray[np.float32]]:
        """Keys and values of the first `count` tokens by name, where `cache_is_input`: float32."""
        raise UsageError(f"{self.name} does not show its KV cache", remedy="Use target onnx.")

    def restore(self, tokens: Sequence[int], arrays: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Sets the KV cache to `cache` of the same artifact after `tokens`, where `cache_is_input`."""
        raise UsageError(f"{self.name} does not take a KV cache", remedy="Use target onnx.")

    def classify(self, text: str | Sequence[Message]) -> Classification:
        """Returns the label of a text with the probabilities of all labels. Forgets all tokens first.

        text: a text; of a guard also a conversation, as {"role": …, "content": …}, whose last message is judged.

        Raises UsageError for a bundle that generates text.
        """
        if self.text_classifier is None:
            raise UsageError(
                f"{self.name} runs a model that generates text, and has no labels",
                remedy="Export the checkpoint with --task classify.",
            )
        return self.text_classifier.classify(self, text)

    def use(self, name: str | None) -> Self:
        """Switches to the adapter `name`, or to the base for None, and forgets all tokens. Returns itself.

        The weights of the base stay loaded. An adapter is read at its first use. Raises UsageError for a name that
        the bundle does not have, BundleError for a file that does not belong to this base.

        >>> import edgellama
        >>> with edgellama.load(bundle).use(None) as runtime:
        ...     runtime.adapter is None, runtime.position
        (True, 0)
        """
        if name is not None and name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise UsageError(
                f"no adapter {name!r:.60} for {self.name}: the bundle has {known}",
                remedy="Export the bundle with --adapters NAME=DIR, for a target whose runtime can switch.",
            )
        self._use(None if name is None else self.adapters[name])
        self.adapter = name
        self.reset()
        return self

    def _use(self, file: Path | None) -> None:
        """Switches to the adapter in `file`, or to the base. Runtimes that can switch override it."""
        if file is not None:
            raise UsageError(
                f"{self.name} cannot switch adapters", remedy="Export the adapter merged (--adapter)."
            )

    def forward_all(self, tokens: Sequence[int]) -> Tensor:
        """Returns the logits after each of `tokens`: float32 [T, vocab_size]. The tokens join the KV cache.

        Makes one call per token, as an app decodes. Runtimes whose artifact returns all rows of a call
        override it.
        """
        first = self.forward(tokens[:1])
        # Filled at once, because a list of rows would double the memory.
        rows = np.empty((len(tokens), len(first)), np.float32)
        rows[0] = first
        for row, token in zip(rows[1:], tokens[1:], strict=True):
            row[:] = self.forward([token])
        return torch.from_numpy(rows)

    def checks(self) -> list[Check]:
        """Returns the gate checks that the runtime made while it computed."""
        return []

    def own_tokenizer(self) -> OwnTokenizer | None:
        """Returns the tokenizer that the artifact holds. None for artifacts that take ids only."""
        return None

    @abstractmethod
    def _forward(self, tokens: Sequence[int], position: int) -> Logits:
        """Returns the logits after `tokens` at `position`. Both are already checked."""

    def close(self) -> None:
        """Release the model. A runtime that holds only memory has nothing to release."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        """The tokens as a list, from any sequence of integers: a numpy array or a tensor too."""
        check_torch_defaults()
        try:
            tokens = [operator.index(token) for token in tokens]
        except TypeError as error:
            raise UsageError(
                f"token ids are integers in one sequence ({error})", remedy="Give a flat sequence of ids."
            ) from error
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
        return tokens
