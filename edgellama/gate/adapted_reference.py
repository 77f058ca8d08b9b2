"""Logits of the quantized model plus an adapter that is not merged, in a target's arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from edgellama.checkpoints.streamed import Rows, Wanted, chosen_rows
from edgellama.gate.references import SEED, QuantizedReference, with_noise
from edgellama.host.progress import Progress
from edgellama.model.adapted import Pairs, adapted
from edgellama.model.llama import Llama
from edgellama.recipe import Recipe
from edgellama.targets import Target


class AdaptedReference(QuantizedReference):
    """A `QuantizedReference` with an adapter beside its linears. Nothing is read ahead or remembered.

    The walk layer by layer knows no adapters, so each text is one pass of the whole model.
    """

    def __init__(self, model: Llama, recipe: Recipe, target: Target, pairs: Pairs) -> None:
        super().__init__(model, recipe, target)
        self.pairs = pairs

    def read_ahead(
        self, sequences: Sequence[Sequence[int]], progress: Progress | None = None, *, noisy: bool = False
    ) -> None:
        return

    def logits_of(self, wanted: Sequence[Wanted], *, noisy: bool = False) -> list[Tensor]:
        return [self._one(tokens, rows, noisy=noisy) for tokens, rows in wanted]

    def _one(self, tokens: Sequence[int], rows: Rows, *, noisy: bool) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        noise = _perturbed(self.model, generator, self.target.noise) if noisy else nullcontext()
        with self._arithmetic(), noise:
            return self._forward(tokens, rows)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        with adapted(self.model, self.pairs), self.target.arithmetic(self.model, self.recipe):
            yield

    @torch.inference_mode()
    def _forward(self, tokens: Sequence[int], rows: Rows) -> Tensor:
        logits: Tensor = self.model(torch.tensor([list(tokens)]))[0]
        return chosen_rows(logits, rows)


@contextmanager
def _perturbed(model: Llama, generator: torch.Generator, noise: float) -> Iterator[None]:
    """Adds relative Gaussian noise to the embeddings and to every layer's input during the block."""
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args: (with_noise(args[0], generator, noise), *args[1:])
        )
        for layer in model.model.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
