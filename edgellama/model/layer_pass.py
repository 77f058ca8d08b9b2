"""Pass of windows of text through one decoder layer, in blocks of tokens that stay in the processor's cache.

Every block, and every head of a long window, is one work item. The split depends on lengths alone, so no figure
depends on the number of threads. A sum runs over columns or earlier positions, never over a block, so it has the
bits of the whole window where the matrix product does. That of MKL does, for 16 rows or more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellama.host.threads import Workers
from edgellama.model.activations import NO_ROUNDING, ActivationRounding
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import DecoderLayer, rope_tables, rotate
from edgellama.model.quantized import codes_of
from edgellama.recipe import Scheme

BLOCK = 512  # tokens of a work item at most
GROUP_TOKENS = 2048  # that pass through a layer at a time
States = list[Tensor]  # hidden states float32 [T, hidden_size], one for each window
Dense = tuple[Tensor, Tensor | None]  # weight and bias of a linear
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
Sized = TypeVar("Sized", Tensor, Sequence[int])


def groups(texts: Sequence[Sized], tokens: int = GROUP_TOKENS) -> Iterator[list[Sized]]:
    """Hidden states or token ids of texts, in order, in groups of at most `tokens` tokens or of one text.

    A layer holds several inputs of each token at once, so fewer tokens at a time need less memory.

    >>> [len(group) for group in groups([torch.zeros(1500, 8)] * 3)]
    [1, 1, 1]
    """
    group: list[Sized] = []
    for text in texts:
        if group and sum(map(len, group)) + len(text) > tokens:
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def blocks(length: int, most: int = BLOCK) -> list[slice]:
    """Positions of a window in blocks of nearly one length, which is at most `most`.

    >>> blocks(1200)
    [slice(0, 400, None), slice(400, 800, None), slice(800, 1200, None)]
    """
    count = -(-length // most)
    return [slice(length * i // count, length * (i + 1) // count) for i in range(count)]


def dense(module: nn.Module) -> Dense:
    """Weight and bias of a linear, dequantized."""
    codes = codes_of(module)
    weight: Tensor = module.get_parameter("weight") if codes is None else codes.dequantize()
    bias = module.get_parameter("bias") if getattr(module, "bias", None) is not None else None
    return weight, bias


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a whole window to itself: q [1, T, H, D], k and v [1, T, G, D] -> [1, T, H, D].

    The bits are those of `KVCache` from position 0, in less than half of the time: no mask is read, and keys of
    later positions are not multiplied.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def pass_layer(
    layer: DecoderLayer,
    states: States,
    config: LlamaConfig,
    pool: Workers,
    schemes: Mapping[str, Scheme | None] | None = None,
    rounding: ActivationRounding = NO_ROUNDING,
) -> States:
    """Hidden states after `layer`. Each of its linears is dequantized once.

    Args:
        layer: the decoder layer.
        states: hidden states before the layer, float32 [T, hidden_size] per window.
        config: of the model.
        pool: threads.
        schemes: schemes of the layer's linears, by name in the layer. A linear without a scheme reads float inputs.
        rounding: activation rounding of the target. Linears that share an input are rounded by the first scheme.
    """
    weights = pool.map(lambda name: dense(layer.get_submodule(name)), LINEARS)
    passed = _Pass(layer, config, dict(zip(LINEARS, weights, strict=True)), schemes or {}, rounding)
    return list(chain.from_iterable(passed.through(group, pool) for group in groups(states)))


@dataclass(frozen=True)
class _Window:
    """Values of one window between the parts of a layer: q and y [1, T, H, D], k and v [1, T, G, D]."""

    states: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    y: Tensor
    after: Tensor  # hidden states after the layer

    @classmethod
    def of(cls, states: Tensor, config: LlamaConfig) -> _Window:
        def heads(count: int) -> Tensor:
            return torch.empty(1, len(states), count, config.head_dim)

        query, shared = config.num_attention_heads, config.num_key_value_heads
        with torch.inference_mode(False):  # else other threads may not write into it
            values = heads(query), heads(shared), heads(shared), heads(query)
            return cls(states, *values, torch.empty(states.shape))


@dataclass(frozen=True)
class _Pass:
    """A layer with its dense weights."""

    layer: DecoderLayer
    config: LlamaConfig
    weights: Mapping[str, Dense]
    schemes: Mapping[str, Scheme | None]
    rounding: ActivationRounding

    def through(self, states: States, pool: Workers) -> States:
        windows = [_Window.of(x, self.config) for x in states]
        tables = rope_tables(self.config, max(map(len, states)))
        items = [(window, rows) for window in windows for rows in blocks(len(window.states))]
        _run(pool, lambda item: self._project(*item, tables), items)
        # The longest first, so that no thread is left with it at the end.
        longest_first = sorted(windows, key=lambda window: -len(window.states))
        _run(pool, lambda item: _attend(*item), list(chain.from_iterable(map(self._heads, longest_first))))
        _run(pool, lambda item: self._finish(*item), items)
        return [window.after for window in windows]

    def _project(self, window: _Window, rows: slice, tables: tuple[Tensor, Tensor]) -> None:
        """Writes q, k and v of some positions."""
        cos, sin = (table[rows] for table in tables)
        x = self._read(self.layer.input_layernorm(window.states[rows]), *LINEARS[:3])
        q, k, v = (
            F.linear(x, *self.weights[name]).view(1, len(x), -1, self.config.head_dim) for name in LINEARS[:3]
        )
        heads = rotate(q, cos, sin), rotate(k, cos, sin), v
        for into, values in zip((window.q, window.k, window.v), heads, strict=True):
            into[:, rows] = self.rounding.heads(values)

    def _heads(self, window: _Window) -> list[tuple[_Window, slice, slice]]:
        """Work items of attention: query heads, and the key heads that they read. All of a short window are one."""
        count, shared = window.q.shape[2], window.k.shape[2]
        if len(window.states) <= BLOCK:
            return [(window, slice(0, count), slice(0, shared))]
        width = count // shared
        return [(window, slice(i * width, (i + 1) * width), slice(i, i + 1)) for i in range(shared)]

    def _finish(self, window: _Window, rows: slice) -> None:
        """Writes the hidden states after the layer, of some positions."""
        y = window.y[0, rows]
        x = window.states[rows] + self._linear("self_attn.o_proj", y.reshape(len(y), -1))
        inputs = self._read(self.layer.post_attention_layernorm(x), *LINEARS[4:6])
        gate, up = (F.linear(inputs, *self.weights[name]) for name in LINEARS[4:6])
        window.after[rows] = x + self._linear("mlp.down_proj", self.layer.mlp.act_fn(gate) * up)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(self._read(x, name), *self.weights[name])

    def _read(self, x: Tensor, *linears: str) -> Tensor:
        """Input of linears, rounded by the scheme of the first that has one."""
        chosen = [scheme for name in linears if (scheme := self.schemes.get(name)) is not None]
        return self.rounding.inputs(x, chosen[0]) if chosen else x


Item = TypeVar("Item")


def _run(pool: Workers, function: Callable[[Item], None], items: Sequence[Item]) -> None:
    list(pool.map(function, items))


def _attend(window: _Window, heads: slice, shared: slice) -> None:
    window.y[:, :, heads] = causal_attention(
        window.q[:, :, heads], window.k[:, :, shared], window.v[:, :, shared]
    )
