"""Runtime `llama.cpp-cpu`: a GGUF file in llama.cpp.

There are two forms. The reference form multiplies the blocks as they lie in the file and computes attention in
three products, so that its numbers are tightly those of edgellama.targets.gguf.numerics. The repacked form
arranges the blocks for the processor and uses flash attention, as apps do. It is faster, sums in another order,
and accumulates values in float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgellama.errors import BundleError
from edgellama.runtimes.base import Logits, OwnTokenizer, Runtime
from edgellama.runtimes.llama_cpp import LlamaAdapter, LlamaContext, LlamaModel
from edgellama.runtimes.parts import LONGEST, States
from edgellama.targets.gguf.interface import CONTEXT_LENGTH, MANIFEST_SHA256

DEFAULT_CONTEXT = 2048  # of files that edgellama did not make, at most
_PIECE = 64  # rows of logits of one call, which bounds their memory


class GgufRuntime(Runtime):
    """Runs the GGUF file at `path`. threads: None for torch's number.

    repacked: True for the form that apps run.
    """

    name = "llama.cpp-cpu"

    def __init__(self, path: Path, *, threads: int | None = None, repacked: bool = False) -> None:
        self.model = LlamaModel(path, repacked=repacked)
        self.vocab_size = self.model.vocab_size
        self._opened: dict[Path, LlamaAdapter] = {}  # the model owns them
        self.context_length = _context_length(self.model)
        if repacked:
            self.name = "llama.cpp-cpu-repacked"
        try:
            self._context = self._open(threads or self.threads, repacked)
        except BaseException:
            self.model.close()
            raise

    def _use(self, file: Path | None) -> None:
        self._context.set_adapter(None if file is None else self._adapter(file))

    def _adapter(self, file: Path) -> LlamaAdapter:
        if file not in self._opened:
            adapter, base = self.model.adapter(file), self.model.key(MANIFEST_SHA256)
            if base is None or adapter.key(MANIFEST_SHA256) != base:
                raise BundleError(
                    f"{file}: this adapter does not belong to {self.model.path} (it was made for another base)",
                    remedy="Take both from one bundle.",
                )
            self._opened[file] = adapter
        return self._opened[file]

    def _open(self, threads: int, repacked: bool) -> LlamaContext:
        return LlamaContext(self.model, self.context_length, threads, flash_attention=repacked)

    def _forward(self, tokens: Sequence[int], position: int) -> Logits:
        if position == 0:
            self._context.clear()
        logits: Logits = self._context.decode(tokens, position, all_logits=False)[0]
        return logits

    def forward_all(self, tokens: Sequence[int]) -> Tensor:
        """Returns the logits after each of `tokens`, in calls of up to 64: float32 [T, vocab_size].

        The tokens join the KV cache.
        """
        tokens = self._checked(tokens)
        rows = []
        for start in range(0, len(tokens), _PIECE):
            piece = tokens[start : start + _PIECE]
            if self.position == 0:
                self._context.clear()
            rows.append(self._context.decode(piece, self.position, all_logits=True))
            self.position += len(piece)
        return torch.from_numpy(np.concatenate(rows))

    def own_tokenizer(self) -> OwnTokenizer | None:
        return self.model

    def close(self) -> None:
        self._context.close()
        self.model.close()


def _context_length(model: LlamaModel) -> int:
    """The context that the file was exported for; for other files the trained one, up to DEFAULT_CONTEXT."""
    stated = model.key(CONTEXT_LENGTH)
    if stated is None:
        return min(model.trained_context, DEFAULT_CONTEXT)
    if not stated.isdigit() or not 0 < int(stated) <= model.trained_context:
        model.close()
        raise BundleError(
            f"{model.path}: {CONTEXT_LENGTH} is {stated!r:.40}, the model can have up to {model.trained_context}",
            remedy="Export the bundle again.",
        )
    return int(stated)


class GgufParts(GgufRuntime):
    """Runs a GGUF file and keeps the tensors of the graph that enter its layers."""

    def __init__(self, path: Path, layers: int) -> None:
        self._names = ["embd", *(f"l_out-{layer}" for layer in range(layers - 1))]
        self._seen: dict[str, npt.NDArray[np.float32]] = {}
        super().__init__(path)

    def _open(self, threads: int, repacked: bool) -> LlamaContext:
        return LlamaContext(
            self.model,
            self.context_length,
            threads,
            watched=self._seen.__setitem__,
            names=self._names,
        )

    def states(self, tokens: Sequence[int]) -> States:
        assert len(tokens) <= LONGEST
        self._seen.clear()
        logits = self.forward(tokens)
        missing = [name for name in self._names if name not in self._seen]
        if missing:
            raise BundleError(
                f"{self.model.path}: llama.cpp computes no tensor {missing[0]}",
                remedy="Export the bundle again.",
            )
        inputs = [torch.from_numpy(self._seen[name].reshape(len(tokens), -1)) for name in self._names]
        return States(inputs, torch.from_numpy(logits))
