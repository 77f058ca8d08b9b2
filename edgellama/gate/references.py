"""References of the gate: the full-precision model and the quantized one, each read once for many texts.

Examinations ask for logits of a text. Texts that are known beforehand are read ahead, side by side, so that each
layer is converted once. What was computed is remembered for the next examination, target or golden vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.streamed import ALL, Rows, StreamedLlama, Wanted, chosen_rows, remember
from edgellama.host.progress import Progress
from edgellama.host.threads import workers
from edgellama.model.layerwise import LayerwiseModel
from edgellama.model.llama import Llama
from edgellama.recipe import Recipe
from edgellama.targets import Target
from edgellama.targets.base import FLOAT32_NOISE
from edgellama.targets.families import Family

SEED = 0  # of the noise of every text


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
        """family: processors whose kernels stand in here, a replica of those; None for this machine's."""
        self.model, self.recipe, self.target = model, recipe, target
        self.rounding = target.rounding(recipe) if family is None else target.rounding_of(recipe, family)
        self._states: dict[_Key, Tensor] = {}

    def read_ahead(
        self, sequences: Sequence[Sequence[int]], progress: Progress | None = None, *, noisy: bool = False
    ) -> None:
        """Computes sequences of token ids in one pass, unless they are remembered. noisy: also with noise."""
        known, count = self._states, self.model.config.num_hidden_layers
        keys = [_Key(tuple(tokens), False) for tokens in sequences]
        keys += [_Key(key.tokens, True) for key in keys if noisy]
        new = [key for key in dict.fromkeys(keys) if key not in known]
        if not new:
            return
        generators = [torch.Generator().manual_seed(SEED) if key.noisy else None for key in new]
        with self._layerwise() as layerwise, (progress or Progress()).bar("quantized", count, "layer") as bar:
            states = layerwise.embed([key.tokens for key in new])
            for index in range(count):
                states = list(layerwise.pool.map(self._perturbed, zip(states, generators, strict=True)))
                (states,) = layerwise.layer(index, [states])
                bar.update(1)
        remember(known, dict(zip(new, states, strict=True)))

    def _perturbed(self, item: tuple[Tensor, torch.Generator | None]) -> Tensor:
        states, generator = item
        return states if generator is None else with_noise(states, generator, self.target.noise)

    def logits(self, tokens: Sequence[int], rows: Rows = ALL) -> Tensor:
        """Logits after the tokens at `rows`, float32 [rows, vocab_size]."""
        return self.logits_of([(tokens, rows)])[0]

    def noisy_logits(self, tokens: Sequence[int], rows: Rows = ALL) -> Tensor:
        """The same with noise."""
        return self.logits_of([(tokens, rows)], noisy=True)[0]

    def logits_of(self, wanted: Sequence[Wanted], *, noisy: bool = False) -> list[Tensor]:
        """Logits of several texts, each at its rows, float32 [rows, vocab_size]. The head is dequantized once."""
        self.read_ahead([tokens for tokens, _ in wanted], noisy=noisy)
        states = [chosen_rows(self._states[_Key(tuple(tokens), noisy)], rows) for tokens, rows in wanted]
        with self._layerwise() as layerwise:
            return list(layerwise.logits(torch.cat(states)).split([len(x) for x in states]))

    @contextmanager
    def _layerwise(self) -> Iterator[LayerwiseModel]:
        with self.target.stored_floats(self.model, self.recipe), workers() as pool, torch.no_grad():
            yield LayerwiseModel.as_target(self.model, self.recipe, self.rounding, pool)


@dataclass(frozen=True)
class _Key:
    """A text whose hidden states are remembered, with noise or without."""

    tokens: tuple[int, ...]
    noisy: bool


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
