"""Arithmetic of the Core ML targets in torch: integer weights, float activations.

It computes in float32, not float16. Parity measures the artifact's own rounding, which differs between
compute units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from edgellama.model.llama import KVCache, Llama, RMSNorm
from edgellama.model.quantized import WeightOnlyLinear, codes_of
from edgellama.model.swap import replaced
from edgellama.recipe import Recipe


@contextmanager
def coreml_numerics(model: Llama, recipe: Recipe | None = None) -> Iterator[None]:
    """Context in which `model` computes as the Core ML targets do, apart from float16 rounding."""
    with replaced(model, _replacement):
        yield


@contextmanager
def stored_numerics(model: Llama, *, stateful: bool) -> Iterator[None]:
    """`coreml_numerics` with the numbers that the program stores in float16: norms, RoPE tables, biases, floats.

    Sums and results stay float32, as in mode `fp32` of the interpreter. stateful: False for a cache that is
    an input and therefore float16.
    """

    def replacement(module: nn.Module) -> nn.Module | None:
        if isinstance(module, RMSNorm):
            return _StoredNorm(module)
        if isinstance(module, KVCache) and not stateful:
            return _Float16Cache(module)
        if isinstance(module, nn.Linear):
            codes, bias = codes_of(module), None if module.bias is None else _stored(module.bias)
            return _StoredLinear(module.weight, bias) if codes is None else WeightOnlyLinear(codes, bias)
        if isinstance(module, nn.Embedding):
            embedding: nn.Embedding = nn.Embedding.from_pretrained(_stored(module.weight))
            return embedding
        return None

    decoder = model.model
    tables = decoder.cos, decoder.sin
    decoder.cos, decoder.sin = _stored(tables[0]), _stored(tables[1])
    try:
        with replaced(model, replacement):
            yield
    finally:
        decoder.cos, decoder.sin = tables


def _stored(values: Tensor) -> Tensor:
    return values.detach().half().float()


class _StoredLinear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = _stored(weight), bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _StoredNorm(nn.Module):
    """The program squares a float16 root of epsilon."""

    def __init__(self, source: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = _stored(source.weight), float(torch.tensor(source.eps**0.5).half()) ** 2

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class _Float16Cache(nn.Module):
    """A cache that rounds the keys and values of earlier calls, but not those of its own call."""

    def __init__(self, source: KVCache) -> None:
        super().__init__()
        self.source = source

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        for cache in (self.source.k_cache, self.source.v_cache):
            cache[:, :position] = _stored(cache[:, :position])
        y: Tensor = self.source(q, k, v, position)
        return y


def _replacement(module: nn.Module) -> nn.Module | None:
    if not isinstance(module, nn.Linear) or not isinstance(module.weight, IntxUnpackedToInt8Tensor):
        return None
    codes = codes_of(module)
    return None if codes is None else WeightOnlyLinear(codes, module.bias)
