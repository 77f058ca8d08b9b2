"""References of the gate: the full-precision model and the quantized one, each read once for many texts.

Examinations ask for logits of a text. Texts that are known beforehand are read ahead, side by side, so that each
layer is converted once. What was computed is remembered for the next examination, target or golden vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.host.progress import Progress
from edgellama.host.threads import workers
from edgellama.model.layerwise import LayerwiseModel
from edgellama.model.llama import Llama
from edgellama.recipe import Recipe
from edgellama.targets import Target
from edgellama.targets.base import FLOAT32_NOISE
from edgellama.targets.families import Family

REMEMBERED_BYTES = 1 << 28  # of hidden states
SEED = 0  # of the noise of every text
Rows = slice | Sequence[int]
ALL = slice(None)


def with_noise(x: Tensor, generator: torch.Generator, noise: float = FLOAT32_NOISE) -> Tensor:
    """Returns `x` with relative Gaussian noise."""
    return x * (1 + noise * torch.randn(x.shape, generator=generator))


class QuantizedReference:
    """Logits of the quantized model in a target's arithmetic, and of the same model with noise.

    The noise has the relative size `Target.noise`. It is added to the embeddings and to the input of every layer,
    where sums in another order make their noise. Each text has a generator of its own, so it has the same noise
    in every company.

    >>> from edgellama.checkpoints import open_checkpoint
    >>> from edgellama.export.quantization.quantize import quantized_llama
    >>> from edgellama.targets import find_target
    >>> quantized, _ = quantized_llama(open_checkpoint(model), bundle.recipe, 16)
    >>> reference = QuantizedReference(quantized, bundle.recipe, find_target("xnnpack"))
    >>> exact, noisy = reference.logits([1, 2, 3]), reference.noisy_logits([1, 2, 3])
    >>> bool((exact - noisy).abs().max() < 0.1)
    True
    """

    def __init__(self, model: Llama, recipe: Recipe, target: Target, family: Family | None = None) -> None:
        """family: of processors whose rounding is computed, without noise; None for this machine's, with noise."""
        self.model, self.recipe, self.target = model, recipe, target
        self.rounding = target.rounding(recipe) if family is None else target.rounding_of(recipe, family)
        self._noisy = family is None
        self._states: dict[tuple[int, ...], tuple[Tensor, ...]] = {}

    def read_ahead(self, sequences: Sequence[Sequence[int]], progress: Progress | None = None) -> None:
        """Computes sequences of token ids in one pass, unless they are remembered."""
        known = self._states
        new = [tokens for tokens in dict.fromkeys(map(tuple, sequences)) if tokens not in known]
        if not new:
            return
        generators = [torch.Generator().manual_seed(SEED) for _ in new]
        count = self.model.config.num_hidden_layers
        with self.target.stored_floats(self.model, self.recipe), workers() as pool, torch.no_grad():
            layerwise = LayerwiseModel.as_target(self.model, self.recipe, self.rounding, pool)
            variants = [layerwise.embed(new)] * (1 + self._noisy)
            with (progress or Progress()).bar("quantized", count, "layer") as bar:
                for index in range(count):
                    if self._noisy:
                        variants[1] = [
                            with_noise(x, generator, self.target.noise)
                            for x, generator in zip(variants[1], generators, strict=True)
                        ]
                    variants = layerwise.layer(index, variants)
                    bar.update(1)
        known.update(zip(new, zip(*variants, strict=True), strict=True))
        while len(known) > len(new) and sum(len(x) * x[0].nbytes for x in known.values()) > REMEMBERED_BYTES:
            del known[next(iter(known))]

    def logits(self, tokens: Sequence[int], rows: Rows = ALL) -> Tensor:
        """Logits after the tokens at `rows`, float32 [rows, vocab_size]."""
        return self._head(tokens, 0, rows)

    def noisy_logits(self, tokens: Sequence[int], rows: Rows = ALL) -> Tensor:
        """The same with noise."""
        return self._head(tokens, 1, rows)

    def _head(self, tokens: Sequence[int], which: int, rows: Rows) -> Tensor:
        self.read_ahead([tokens])
        states = self._states[tuple(tokens)][which][rows if isinstance(rows, slice) else list(rows)]
        with self.target.stored_floats(self.model, self.recipe), workers() as pool, torch.no_grad():
            return LayerwiseModel.as_target(self.model, self.recipe, self.rounding, pool).logits(states)


@dataclass
class References:
    """Both references of a checkpoint, shared by the targets of an export and by its golden vectors.

    Attributes:
        full: the full-precision model.
        quantized: the quantized model of an export; None if each target's is to be restored from its artifact.
    """

    full: StreamedLlama
    quantized: Llama | None = None
    _by_target: dict[str, QuantizedReference] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, quantized: Llama | None = None) -> References:
        """References of which nothing is read yet."""
        return cls(StreamedLlama(checkpoint), quantized)

    def of_target(self, model: Llama, recipe: Recipe, target: Target) -> QuantizedReference:
        """The quantized reference of a target, remembered while `model` is the export's own."""
        if model is not self.quantized:
            return QuantizedReference(model, recipe, target)
        if target.name not in self._by_target:
            self._by_target[target.name] = QuantizedReference(model, recipe, target)
        return self._by_target[target.name]
