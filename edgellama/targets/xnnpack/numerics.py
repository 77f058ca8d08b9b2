"""Arithmetic of target `xnnpack` in torch, rounding for rounding: the reference for the parity of a .pte.

Later layers amplify every int8 activation that rounds the other way. A model that agrees only to float32
precision therefore drifts away from a correct artifact. Here each step rounds where the artifact rounds:

- XNNPACK's linears: activations quantized by its formula, exact integer sums.
- XNNPACK's operators between linears. Its sigmoid and reciprocal square root are approximations that differ
  between processors, so XNNPACK itself computes them (`edgellama.targets.xnnpack.functions`). The rest is
  computed here.

A two-layer cut of SmolLM2-135M, fed token by token, then agrees to a mean KL of 1e-13 over 256 tokens.
torchao's own emulation reaches 2e-3. Attention stays in torch, as the independent part. At 30 layers its
different order of sums is enough to let the two drift apart. `parity` measures this as the noise floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from edgellama.model.activations import (
    INT8_PER_TOKEN,
    ActivationRounding,
    int8_per_head,
    quantize_activations,
)
from edgellama.model.held import converted
from edgellama.model.llama import KVCache, Llama, RMSNorm, SiLU
from edgellama.model.swap import replaced
from edgellama.recipe import Recipe
from edgellama.targets.xnnpack.functions import rsqrt, sigmoid
from edgellama.targets.xnnpack.scales import pair

# Products |activation - zero point| * |code| are at most 255 * 127, so float32 holds a sum of this many
# exactly.
_EXACT_COLUMNS = 512


def rounding(recipe: Recipe) -> ActivationRounding:
    """int8 inputs per token, and int8 heads if the KV cache is int8."""
    return replace(INT8_PER_TOKEN, heads=int8_per_head) if recipe.kv_cache == "int8" else INT8_PER_TOKEN


class XnnpackLinear(nn.Module):
    """A quantized linear with exact integer sums. To save memory, codes become float32 anew at each call."""

    def __init__(self, weight: IntxUnpackedToInt8Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        grouped = weight.block_size[1] < weight.shape[1]
        two = pair(weight.scale.reshape(weight.shape[0], -1), "a linear", grouped=grouped)
        self.scales: Tensor = weight.scale if two is None else two[0]
        self.less: Tensor | None = None if two is None else two[1]

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., columns] -> float32 [..., rows]."""
        y = self._product(x, self.scales)
        if self.bias is not None:
            y = y + self.bias
        return y if self.less is None else y - self._product(x, self.less)

    def _product(self, x: Tensor, scales: Tensor) -> Tensor:
        q, scale = quantize_activations(x)
        rows, columns = self.weight.shape
        width = self.weight.block_size[1]
        flat, scale = q.reshape(-1, columns), scale.reshape(-1, 1)
        if width < columns:
            codes = converted(self, self._groups)  # [groups, width, rows]
            sums = torch.bmm(
                flat.reshape(-1, columns // width, width).transpose(0, 1), codes
            )  # [groups, T, rows]
            y = (sums * scales.t()[:, None, :]).sum(0) * scale
        else:
            total = torch.zeros(flat.shape[0], rows, dtype=torch.float64)
            for start in range(0, columns, _EXACT_COLUMNS):
                piece = slice(start, start + _EXACT_COLUMNS)
                total += flat[:, piece] @ self.weight.qdata[:, piece].t().float()
            y = total.float() * scale * scales.t()
        reshaped: Tensor = y.reshape(*x.shape[:-1], rows)
        return reshaped

    def _groups(self) -> Tensor:
        rows, columns = self.weight.shape
        width = self.weight.block_size[1]
        codes: Tensor = self.weight.qdata.reshape(rows, columns // width, width).permute(1, 2, 0).float()
        return codes


def norm_weight(norm: RMSNorm) -> Tensor:
    """Weight in the artifact, float32 [n]: times sqrt(n), because it divides by a sum, not by a mean."""
    return norm.weight.detach() * math.sqrt(norm.weight.shape[0])


def sum_bias(norm: RMSNorm) -> Tensor:
    """n * eps, float32 [1]: start value of the artifact's sum of n squares."""
    return torch.tensor([norm.weight.shape[0] * norm.eps])


def wide_rope_tables(model: Llama) -> tuple[Tensor, Tensor]:
    """(cos, sin) in the artifact, float32 [S, 1, D], for x * cos + (x with its halves swapped) * sin."""
    cos, sin = model.model.cos, model.model.sin
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


class XnnpackRMSNorm(nn.Module):
    """x / sqrt(n * eps + sum of squares) * (sqrt(n) * weight).

    The squares are added one by one in float32.
    """

    def __init__(self, source: RMSNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm_weight(source), sum_bias(source)

    def forward(self, x: Tensor) -> Tensor:
        start = self.bias.expand(*x.shape[:-1], 1)
        squares = torch.cat((start, x * x), -1).numpy()
        total = torch.from_numpy(np.add.accumulate(squares, axis=-1, dtype=np.float32)[..., -1:].copy())
        return x * rsqrt(total) * self.weight


class XnnpackSiLU(nn.Module):
    """x * sigmoid(x), by XNNPACK's own sigmoid."""

    def __init__(self, source: SiLU) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x * sigmoid(x)


class XnnpackInt8Cache(nn.Module):
    """KV cache in int8. Here it stores the floats that the codes stand for."""

    def __init__(self, source: KVCache) -> None:
        super().__init__()
        self.source = source

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        y: Tensor = self.source(int8_per_head(q), int8_per_head(k), int8_per_head(v), position)
        return y


@contextmanager
def xnnpack_numerics(model: Llama, recipe: Recipe | None = None) -> Iterator[None]:
    """Context in which `model` computes as target `xnnpack` does."""
    with ExitStack() as stack:
        stack.enter_context(replaced(model, _replacement))
        if recipe is not None and recipe.kv_cache == "int8":
            stack.enter_context(
                replaced(model, lambda m: XnnpackInt8Cache(m) if isinstance(m, KVCache) else None)
            )
        yield


def _replacement(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.Linear) and isinstance(module.weight, IntxUnpackedToInt8Tensor):
        return XnnpackLinear(module.weight, module.bias)
    if isinstance(module, RMSNorm):
        return XnnpackRMSNorm(module)
    if isinstance(module, SiLU):
        return XnnpackSiLU(module)
    return None
