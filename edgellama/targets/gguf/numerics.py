"""Arithmetic of target `gguf` in torch: llama.cpp on a CPU, as of 2026.

A product with Q4_0 or Q8_0 weights rounds its input to Q8_0: blocks of 32 values share a float16 scale,
absmax / 127. The codes come from 127 / absmax in float32, before the scale is rounded, and halves round to even.
The products of a block are summed as integers, and blocks are summed in float32.

Keys and values are float16 in the cache. Attention multiplies them with float16 queries and probabilities, and
sums in float32. The rotary angle of each frequency is the last one's times a constant, in float32.

What remains is the order of sums, and the polynomials that stand for exp in SiLU and softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellama.formats.gguf_blocks import BLOCK
from edgellama.model.activations import ActivationRounding
from edgellama.model.config import LlamaConfig
from edgellama.model.held import converted
from edgellama.model.llama import KVCache, Llama
from edgellama.model.quantized import Codes, codes_of
from edgellama.model.swap import replaced
from edgellama.targets.gguf.interface import rope_factors


def q8_0(x: Tensor) -> Tensor:
    """Rounds float32 [..., n] to Q8_0 and back, in blocks of 32."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    # torch.div, because `127 / x` is 127 * (1 / x) in torch and rounds twice.
    inverse = torch.where(largest == 0, 0.0, torch.div(torch.tensor(127.0), largest))
    scale = half(torch.div(largest, 127.0))
    rounded: Tensor = (blocks * inverse).round() * scale
    return rounded.flatten(-2)


def half(x: Tensor) -> Tensor:
    """Rounds float32 to float16, and back."""
    return x.half().float()


ROUNDING = ActivationRounding(lambda x, scheme: q8_0(x), half)


class Q8Linear(nn.Module):
    """A quantized linear whose input is rounded to Q8_0."""

    def __init__(self, codes: Codes, bias: Tensor | None) -> None:
        super().__init__()
        self.codes, self.bias = codes, bias

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., columns] -> float32 [..., rows]."""
        return F.linear(q8_0(x), converted(self.codes, self.codes.dequantize), self.bias)


class HalfCache(nn.Module):
    """KV cache in float16, and attention over it with float16 factors."""

    def __init__(self, source: KVCache) -> None:
        super().__init__()
        self.source = source

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        cache, end = self.source, position + q.shape[1]
        cache.k_cache[:, position:end], cache.v_cache[:, position:end] = half(k), half(v)
        groups = q.shape[2] // k.shape[2]
        keys, values = (
            part[:, :end].repeat_interleave(groups, dim=2).transpose(1, 2)  # [B, H, end, D]
            for part in (cache.k_cache, cache.v_cache)
        )
        scores = half(q).transpose(1, 2) @ keys.transpose(2, 3) * q.shape[-1] ** -0.5
        visible = torch.ones(q.shape[1], end, dtype=torch.bool, device=q.device).tril(diagonal=position)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        y: Tensor = (half(weights) @ values).transpose(1, 2)
        return y


def rope_tables(config: LlamaConfig, positions: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) of ggml's rotary angles, each float32 [positions, 1, D / 2] (ggml_rope_cache_init)."""
    step = np.float32(np.float32(config.rope_theta) ** np.float32(-2.0 / config.head_dim))
    factors = rope_factors(config)
    scaling = config.rope_scaling
    linear = scaling is not None and scaling.rope_type == "linear"
    scale = np.float32(1.0) / np.float32(scaling.factor if scaling is not None and linear else 1.0)
    angles = np.empty((positions, config.head_dim // 2), np.float32)
    theta = np.arange(positions, dtype=np.float32)
    for i in range(config.head_dim // 2):
        angles[:, i] = theta if factors is None else theta / np.float32(factors[i])
        theta = theta * step
    turned = torch.from_numpy(angles * scale)[:, None, :]
    return turned.cos(), turned.sin()


@contextmanager
def gguf_numerics(model: Llama) -> Iterator[None]:
    """Context in which `model` computes as target `gguf` does."""
    decoder = model.model
    tables = decoder.cos, decoder.sin
    with replaced(model, _replacement):
        decoder.cos, decoder.sin = rope_tables(model.config, model.context_length)
        try:
            yield
        finally:
            decoder.cos, decoder.sin = tables


def _replacement(module: nn.Module) -> nn.Module | None:
    if isinstance(module, KVCache):
        return HalfCache(module)
    if not isinstance(module, nn.Linear):
        return None
    codes = codes_of(module)
    return None if codes is None else Q8Linear(codes, module.bias)
