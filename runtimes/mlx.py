"""Runtimes `mlx-cpu` and `mlx-gpu`: an MLX directory in mlx-lm's own Llama.

mlx-lm reads config.json and the weights, as an app's loader does. Scales, biases and float tensors become
float32 when they are loaded, which changes no value: MLX emulates 16-bit arithmetic on CPUs, at minutes for a
hundred tokens. Elsewhere than on macOS the CPU computes, and its name is in the report. Kernels of Metal are
not proven by it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_map
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from torch import Tensor

from edgellama.errors import BundleError, UsageError
from edgellama.formats.mlx_model import read_mlx
from edgellama.runtimes.base import Logits, Runtime
from edgellama.runtimes.parts import States
from edgellama.targets.mlx.interface import CONTEXT_LENGTH, VOCAB_SIZE

PIECE = 512  # tokens of a call of the model; attention needs memory for their products with all keys


class MlxRuntime(Runtime):
    """Runs the model in the directory `path`. Raises UsageError for `threads`, which MLX chooses itself.

    own_dtype: computes in the dtype of the file. On CPUs that takes seconds for a token.
    """

    def __init__(self, path: Path, *, threads: int | None = None, own_dtype: bool = False) -> None:
        if threads is not None:
            raise UsageError("MLX chooses its threads itself", remedy="Leave out --threads.")
        self.name = "mlx-gpu" if sys.platform == "darwin" and mx.metal.is_available() else "mlx-cpu"
        self.path = path
        metadata = read_mlx(path).metadata
        try:
            self.vocab_size, self.context_length = int(metadata[VOCAB_SIZE]), int(metadata[CONTEXT_LENGTH])
            self._model: Any = load_model(path, lazy=True)[0]
        except (KeyError, ValueError, RuntimeError, TypeError, OSError) as error:
            raise BundleError(
                f"{path}: mlx-lm cannot load it ({str(error).partition(chr(10))[0]:.200})",
                remedy="Export again with this version of edgellama.",
            ) from error
        if not own_dtype:
            self._model.update(tree_map(_as_float32, self._model.parameters()))
        mx.eval(self._model.parameters())
        self.reset()

    @property
    def threads(self) -> int:
        """One: the CPU backend computes on a single thread, and a GPU has its own."""
        return 1

    def reset(self) -> None:
        super().reset()
        self._cache = make_prompt_cache(self._model)

    def _forward(self, tokens: Sequence[int], position: int) -> Logits:
        logits: Logits = _numpy(self._head(self._hidden(tokens)[:, -1:])[0, 0])
        return logits

    def forward_all(self, tokens: Sequence[int]) -> Tensor:
        """Returns the logits after each of `tokens` in one pass: float32 [T, vocab_size].

        The tokens join the KV cache.
        """
        tokens = self._checked(tokens)
        logits = _numpy(self._head(self._hidden(tokens))[0])
        self.position += len(tokens)
        return torch.from_numpy(logits)

    def _hidden(self, tokens: Sequence[int]) -> mx.array:
        """Hidden states after the final norm of the last piece of `tokens`, [1, T, hidden_size]."""
        pieces = [tokens[start : start + PIECE] for start in range(0, len(tokens), PIECE)]
        states = [self._model.model(mx.array([list(piece)]), self._cache) for piece in pieces]
        return mx.concatenate(states, axis=1)

    def _head(self, states: mx.array) -> mx.array:
        tied = self._model.args.tie_word_embeddings
        logits: mx.array = (self._model.model.embed_tokens.as_linear if tied else self._model.lm_head)(states)
        return logits

    def close(self) -> None:
        del self._model, self._cache


class MlxParts(MlxRuntime):
    """Runs the model layer by layer and returns the input of each."""

    def states(self, tokens: Sequence[int]) -> States:
        tokens = self._checked(tokens)
        decoder = self._model.model
        x = decoder.embed_tokens(mx.array([list(tokens)]))
        mask = create_attention_mask(x, self._cache[0])
        inputs = []
        for layer, cache in zip(decoder.layers, self._cache, strict=True):
            inputs.append(torch.from_numpy(_numpy(x[0])))
            x = layer(x, mask, cache=cache)
        logits = _numpy(self._head(decoder.norm(x)[:, -1:])[0, 0])
        self.position += len(tokens)
        return States(inputs, torch.from_numpy(logits))


def _as_float32(values: mx.array) -> mx.array:
    return values.astype(mx.float32) if mx.issubdtype(values.dtype, mx.floating) else values


def _numpy(values: mx.array) -> Any:
    return np.array(values.astype(mx.float32))
