"""Full-precision model that is read one layer at a time, for many sequences side by side.

A gate knows most of its texts before it begins. All of them pass through one layer, and then through the next,
so each weight is read and converted once, and one layer is in memory. The hidden states after the last layer
are remembered, because several examinations ask for the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellama.checkpoints.checkpoint import Checkpoint
from edgellama.checkpoints.weights import load_weights, release_weights
from edgellama.host.memory import available_memory
from edgellama.host.progress import Progress
from edgellama.host.threads import Workers, workers
from edgellama.model.config import LlamaConfig
from edgellama.model.layer_pass import pass_layer
from edgellama.model.layerwise import in_pieces, layer_of, scratch
from edgellama.model.llama import DecoderLayer, KVCache, Llama, rope_tables
from edgellama.model.swap import replaced

KEPT_BYTES = 1 << 30  # of float32 weights; a smaller model stays in memory after its first pass
_VIEWED = ("F32", "F16", "BF16")  # dtypes that are read as views of the mapped file
REMEMBERED_BYTES = 1 << 28  # of hidden states
_PIECE_VALUES = 1 << 20  # of a weight that are float32 at a time, where few tokens are computed


Rows = slice | Sequence[int]
Wanted = tuple[Sequence[int], Rows]  # token ids of a text, and the rows whose logits are asked for
ALL = slice(None)


class StreamedLlama:
    """Logits of a checkpoint, without the whole model in memory.

    Attributes:
        checkpoint: the checkpoint.
        model: the torch model. Weights that are not in memory are on the meta device.

    Each sequence is computed by one thread, so no figure depends on the number of threads, nor on the
    sequences beside it.

    >>> from edgellama.checkpoints import open_checkpoint
    >>> full = StreamedLlama(open_checkpoint(model))
    >>> full.read_ahead([[1, 2, 3], [4, 5]])
    >>> full.logits([1, 2, 3]).shape == (3, full.config.vocab_size)
    True
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        with torch.device("meta"):
            self.model = Llama(checkpoint.config, 1)
        load_weights(self.model, checkpoint, "model.norm.")
        self._kept = is_kept(checkpoint)
        self._checked = False
        self._tables: dict[str, Tensor] = {}
        self._states: dict[tuple[int, ...], Tensor] = {}

    @property
    def config(self) -> LlamaConfig:
        return self.checkpoint.config

    def read_ahead(self, sequences: Sequence[Sequence[int]], progress: Progress | None = None) -> None:
        """Computes sequences of token ids in one pass, unless they are remembered."""
        known = self._states
        new = [tokens for tokens in dict.fromkeys(map(tuple, sequences)) if tokens not in known]
        if not new:
            return
        states = [self._embed(torch.tensor(tokens)) for tokens in new]
        count = self.config.num_hidden_layers
        with torch.inference_mode(), workers() as pool:
            with (progress or Progress()).bar("full precision", count, "layer") as bar:
                for layer in self.layers():
                    states = pass_layer(layer, states, self.config, pool)
                    bar.update(1)
            normed = list(pool.map(self.model.model.norm, states))
        remember(known, dict(zip(new, normed, strict=True)))

    def logits(self, tokens: Sequence[int], rows: Rows = ALL) -> Tensor:
        """Logits after the tokens at `rows`, float32 [rows, vocab_size]. By default after each token."""
        return self.logits_of([(tokens, rows)])[0]

    def logits_of(self, wanted: Sequence[Wanted]) -> list[Tensor]:
        """Logits of several texts, each at its rows, float32 [rows, vocab_size]. The head is converted once."""
        self.read_ahead([tokens for tokens, _ in wanted])
        states = [chosen_rows(self._states[tuple(tokens)], rows) for tokens, rows in wanted]
        with torch.inference_mode(), workers() as pool:
            return list(self._head(torch.cat(states), pool).split([len(x) for x in states]))

    @torch.inference_mode()
    def continue_greedily(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Most likely continuations of prompts of one length, `count` tokens each.

        The prompts go side by side, so each step reads the weights once for all.
        """
        length, batch = len(prompts[0]), len(prompts)
        context = length + count
        caches = [KVCache(self.config, context, batch) for _ in range(self.config.num_hidden_layers)]
        cos, sin = rope_tables(self.config, context)
        tokens = torch.tensor(prompts)
        with workers() as pool:
            for _ in range(count):
                position = 0 if tokens.shape[1] == length else tokens.shape[1] - 1
                fed = tokens[:, position:]
                here = slice(position, position + fed.shape[1])
                x, layers = self._embed(fed), self.layers(stored=True)
                for layer, cache in zip(layers, caches, strict=True):
                    layer.self_attn.cache = cache
                    with replaced(layer, partial(_in_stored_dtype, pool=pool)):
                        x = layer(x, cos[here], sin[here], position)
                best = self._head(self.model.model.norm(x[:, -1]), pool).argmax(-1, keepdim=True)
                tokens = torch.cat((tokens, best), 1)
        continuations: list[list[int]] = tokens[:, length:].tolist()
        return continuations

    def load_tables(self) -> None:
        """Loads the embedding and the head into `model`, which has them on the meta device otherwise."""
        load_weights(self.model, self.checkpoint, ("model.embed_tokens.", "lm_head."))

    def tensor(self, name: str) -> Tensor:
        """One weight as float32, from memory if it is there."""
        return self.stored(name).float()

    def stored(self, name: str) -> Tensor:
        """One weight, as float32 from memory if it is there, else in the dtype of the file."""
        module, _, attribute = name.rpartition(".")
        if self._kept and module.startswith("model.layers."):
            kept: Tensor = getattr(self.model.get_submodule(module), attribute).detach()
            if not kept.is_meta:
                return kept
        return self.checkpoint.stored(name)

    def layers(self, *, stored: bool = False) -> Iterator[DecoderLayer]:
        """The decoder layers in order. Each leaves memory before the next one is read, unless all are kept.

        stored: linears may have the dtype of the checkpoint, if that is a view of the file.
        """
        viewed = stored and not self._kept and is_viewed(self.checkpoint)
        for index in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{index}."
            layer = layer_of(self.model, index)
            if layer.input_layernorm.weight.is_meta:
                linears = [n for n, m in layer.named_modules() if isinstance(m, nn.Linear)] if viewed else []
                names = {f"{prefix}{name}.weight" for name in linears}
                load_weights(self.model, self.checkpoint, prefix, checked=self._checked, stored=names)
            yield layer
            if not self._kept:
                release_weights(self.model, prefix)
        self._checked = True

    def _embed(self, tokens: Tensor) -> Tensor:
        return self._table("model.embed_tokens.weight")[tokens].float()

    def _head(self, states: Tensor, pool: Workers) -> Tensor:
        """Logits of hidden states after the final norm: [T, hidden_size] -> float32 [T, vocab_size]."""
        tied = self.config.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        self._table(name)  # remembered before several threads ask for it, unless it is a view

        def piece(rows: slice) -> Tensor:
            part = self._table(name)[rows]  # mapped anew, so that its pages leave memory with the piece
            return F.linear(states, part if part.dtype == torch.float32 else scratch(part))

        return in_pieces(piece, len(states), self.config.output_size, pool)

    def _table(self, name: str) -> Tensor:
        """A table in the dtype of the checkpoint. A view of the mapped file costs no memory."""
        if name in self._tables:
            return self._tables[name]
        table = self.checkpoint.tensor(name) if self._kept else self.checkpoint.read(name)
        if self._kept or not is_viewed(self.checkpoint):
            self._tables[name] = table
        return table


def chosen_rows(states: Tensor, rows: Rows) -> Tensor:
    """Hidden states at the given rows: [T, hidden_size] -> [rows, hidden_size]."""
    return states[rows if isinstance(rows, slice) else list(rows)]


Key = TypeVar("Key")


def remember(known: dict[Key, Tensor], new: Mapping[Key, Tensor]) -> None:
    """Adds hidden states of texts, and forgets the oldest of the others beyond REMEMBERED_BYTES."""
    known |= new
    while len(known) > len(new) and sum(x.nbytes for x in known.values()) > REMEMBERED_BYTES:
        del known[next(iter(known))]


def is_viewed(checkpoint: Checkpoint) -> bool:
    """Whether a weight is read as a view, in no time: not dequantized, nor merged with an adapter."""
    return not checkpoint.adapters and all(info.dtype in _VIEWED for info in checkpoint.infos.values())


def is_kept(checkpoint: Checkpoint) -> bool:
    """Returns True for a model that stays in memory after its first pass.

    It is small, or its reader computes and should not be asked for each pass while memory is free.
    """
    free = 0 if is_viewed(checkpoint) else (available_memory() or 0)
    return 4 * checkpoint.config.parameters <= max(KEPT_BYTES, free // 2)


class _StoredLinear(nn.Module):
    """A linear whose weight becomes float32 in pieces of rows, which stay in the processor's cache.

    For a few tokens, a float32 copy of the weight would cost many times the product.
    """

    def __init__(self, source: nn.Linear, pool: Workers) -> None:
        super().__init__()
        self.weight, self.bias, self._pool = source.weight, source.bias, pool

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., columns] -> float32 [..., rows]."""
        count, columns = self.weight.shape
        flat = x.reshape(-1, columns)
        width = max(1, _PIECE_VALUES // columns)
        y = in_pieces(
            lambda rows: F.linear(flat, scratch(self.weight[rows])), len(flat), count, self._pool, width
        ).reshape(*x.shape[:-1], count)
        return y if self.bias is None else y + self.bias


def _in_stored_dtype(module: nn.Module, pool: Workers) -> nn.Module | None:
    stored = isinstance(module, nn.Linear) and module.weight.dtype != torch.float32
    return _StoredLinear(module, pool) if stored else None  # type: ignore[arg-type]
