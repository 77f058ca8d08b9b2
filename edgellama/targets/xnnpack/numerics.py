"""The arithmetic of target `xnnpack` in torch, rounding for rounding: what parity compares a .pte with.

One int8 activation that rounds the other way is amplified by every later layer, so a model that merely agrees to
float32 precision drifts away from a correct artifact. Here each step rounds where the artifact rounds: XNNPACK's
linears (activations quantized by its formula, integer sums exact) and its operators between them, whose sigmoid and
reciprocal square root are approximations, other ones on other processors: those two are asked of XNNPACK itself
(`xnnpack_functions`), the rest is computed here. A two-layer cut of SmolLM2-135M, fed token by token, then agrees to a mean KL of 1e-13 over 256 tokens
(torchao's own emulation: 2e-3). Attention is left to torch, as the part that stays independent; at 30 layers its
other order of summing is enough to let the two drift apart, which `parity` measures as the noise floor.
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
from edgellama.model.llama import KVCache, Llama, RMSNorm, SiLU
from edgellama.model.swap import replaced
from edgellama.recipe import Recipe
from edgellama.targets.xnnpack.functions import rsqrt, sigmoid

# Products |activation - zero point| * |code| are at most 255 * 127, so float32 holds any sum of this many exactly.
_EXACT_COLUMNS = 512


def rounding(recipe: Recipe) -> ActivationRounding:
    """int8 inputs per token, and int8 heads where the cache is int8."""
    return replace(INT8_PER_TOKEN, heads=int8_per_head) if recipe.kv_cache == "int8" else INT8_PER_TOKEN


class XnnpackLinear(nn.Module):
    """A quantized linear with exact integer sums. Codes become float32 at each call, so that they cost no memory."""

    def __init__(self, weight: IntxUnpackedToInt8Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., columns] -> float32 [..., rows]."""
        q, scale = quantize_activations(x)
        rows, columns = self.weight.shape
        width = self.weight.block_size[1]
        flat, scale = q.reshape(-1, columns), scale.reshape(-1, 1)
        if width < columns:
            codes = self.weight.qdata.reshape(rows, columns // width, width).permute(1, 2, 0).float()
            sums = torch.bmm(
                flat.reshape(-1, columns // width, width).transpose(0, 1), codes
            )  # [groups, T, rows]
            y = (sums * self.weight.scale.t()[:, None, :]).sum(0) * scale
        else:
            total = torch.zeros(flat.shape[0], rows, dtype=torch.float64)
            for start in range(0, columns, _EXACT_COLUMNS):
                piece = slice(start, start + _EXACT_COLUMNS)
                total += flat[:, piece] @ self.weight.qdata[:, piece].t().float()
            y = total.float() * scale * self.weight.scale.t()
        if self.bias is not None:
            y = y + self.bias
        reshaped: Tensor = y.reshape(*x.shape[:-1], rows)
        return reshaped


def norm_weight(norm: RMSNorm) -> Tensor:
    """The weight that the artifact stores, float32 [n]: times sqrt(n), because it divides by a sum and not by a mean."""
    return norm.weight.detach() * math.sqrt(norm.weight.shape[0])


def sum_bias(norm: RMSNorm) -> Tensor:
    """n * eps, float32 [1]: where the artifact's sum of n squares starts."""
    return torch.tensor([norm.weight.shape[0] * norm.eps])


def wide_rope_tables(model: Llama) -> tuple[Tensor, Tensor]:
    """(cos, sin) as the artifact stores them, float32 [S, 1, D]: x * cos + (x with its halves swapped) * sin."""
    cos, sin = model.model.cos, model.model.sin
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


class XnnpackRMSNorm(nn.Module):
    """x / sqrt(n * eps + sum of squares) * (sqrt(n) * weight), the squares added one float32 after the other."""

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
    """A cache that keeps int8. What it stores here are the floats that the codes stand for."""

    def __init__(self, source: KVCache) -> None:
        super().__init__()
        self.source = source

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        y: Tensor = self.source(int8_per_head(q), int8_per_head(k), int8_per_head(v), position)
        return y


@contextmanager
def xnnpack_numerics(model: Llama, recipe: Recipe | None = None) -> Iterator[None]:
    """`model` computed as target `xnnpack` computes it, for the duration."""
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
