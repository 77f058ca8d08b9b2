"""Runtime `torch-reference`: the torch model, full precision or quantized, for comparison with artifacts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgellama.model.llama import Llama
from edgellama.runtimes.base import Logits, Runtime


class ReferenceRuntime(Runtime):
    """Runs an `edgellama.model.llama.Llama` on the CPU in float32."""

    def __init__(self, model: Llama, *, name: str = "torch-reference") -> None:
        self.name = name
        self.model = model
        self.vocab_size, self._output_size = model.config.vocab_size, model.config.output_size
        self.context_length = model.context_length

    @torch.inference_mode()
    def _forward(self, tokens: Sequence[int], position: int) -> Logits:
        logits = self.model.last_logits(torch.tensor([list(tokens)]), position)
        return logits[0].numpy()

    @torch.inference_mode()
    def forward_all(self, tokens: Sequence[int]) -> Tensor:
        """Returns the logits after each of `tokens` in one pass: float32 [T, vocab_size].

        The tokens join the KV cache.
        """
        tokens = self._checked(tokens)
        logits = self.model(torch.tensor([list(tokens)]), self.position)[0]
        self.position += len(tokens)
        return logits  # type: ignore[no-any-return]
