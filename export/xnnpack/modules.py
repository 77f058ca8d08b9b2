"""Modules in ExecuTorch's operators, which replace the Llama's own in a lowered method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgellama.host.executorch_libraries  # noqa: F401  registers llama::* and quantized_decomposed::*

# isort: split
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  shapes for torch.export

from edgellama.model.llama import KVCache
from edgellama.model.quantized import Codes, QuantizedEmbedding, codes_of
from edgellama.targets.xnnpack.scales import pair


class ExecutorchCache(nn.Module):
    """The KV cache and attention of `edgellama.model.llama.KVCache` in ExecuTorch's operators."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, source: KVCache) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros_like(source.k_cache), persistent=False)
        self.register_buffer("v_cache", torch.zeros_like(source.v_cache), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        """q [1, T, H, D], k and v [1, T, G, D] -> [1, T, H, D]. Updates the cache at `position`."""
        torch.ops.llama.update_cache(k, self.k_cache, position)
        torch.ops.llama.update_cache(v, self.v_cache, position)
        y: Tensor = torch.ops.llama.custom_sdpa(q, self.k_cache, self.v_cache, position, None, 0, True)
        return y


class Int8Cache(nn.Module):
    """A KV cache of int8 codes, with a scale and a zero point per head and token, and attention on them."""

    k_cache: Tensor
    v_cache: Tensor
    k_scales: Tensor
    v_scales: Tensor
    k_zeros: Tensor
    v_zeros: Tensor

    def __init__(self, source: KVCache) -> None:
        super().__init__()
        for name, shape in (("k", source.k_cache.shape), ("v", source.v_cache.shape)):
            row = (*shape[:-1], 1)
            self.register_buffer(f"{name}_cache", torch.zeros(shape, dtype=torch.int8), persistent=False)
            self.register_buffer(f"{name}_scales", torch.zeros(row), persistent=False)
            self.register_buffer(f"{name}_zeros", torch.zeros(row, dtype=torch.int8), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        """q [1, T, H, D], k and v [1, T, G, D] -> [1, T, H, D]. Updates the cache at `position`."""
        q, q_scale, q_zero = _int8(q)
        for new, buffers in (
            (_int8(k), (self.k_cache, self.k_scales, self.k_zeros)),
            (_int8(v), (self.v_cache, self.v_scales, self.v_zeros)),
        ):
            for value, buffer in zip(new, buffers, strict=True):
                torch.ops.llama.update_cache(value, buffer, position)
        y: Tensor = torch.ops.llama.custom_quantized_sdpa(
            q,
            self.k_cache,
            self.v_cache,
            position,
            None,  # mask
            0,  # dropout
            True,  # causal
            None,  # scale: 1 / sqrt(D)
            q_zero,
            q_scale,
            self.k_zeros,
            self.k_scales,
            self.v_zeros,
            self.v_scales,
        )
        return y


def _int8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x as (codes int8 [..., D], scales float32 [..., 1], zero points int8 [..., 1])."""
    ops = torch.ops.quantized_decomposed
    scales, zeros = ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    codes = ops.quantize_per_token.default(x, scales, zeros, -128, 127, torch.int8)
    return codes, scales.to(torch.float32), zeros.to(torch.int8)


CACHES: dict[str, type[nn.Module]] = {"float": ExecutorchCache, "int8": Int8Cache}
"""By a recipe's `kv_cache`."""


class ExecutorchEmbedding(nn.Module):
    """The embedding look-up as its kernel's own operator, so that it needs no fusion pass."""

    values: Tensor
    scales: Tensor

    def __init__(self, source: QuantizedEmbedding) -> None:
        super().__init__()
        self.register_buffer("values", source.values)
        self.register_buffer("scales", source.scales)

    def forward(self, tokens: Tensor) -> Tensor:
        rows: Tensor = torch.ops.quantized_decomposed.embedding_byte.dtype(
            self.values, self.scales, None, -128, 127, tokens, dtype=torch.float32
        )
        return rows


class DecomposedLinear(nn.Module):
    """A quantized linear in the operators that XNNPACK's partitioner recognizes.

    torchao's own tensor traces to the same .pte bytes, but every pass traces its Python functions again.
    These operators are leaves with shape functions.

    less: scales of a second product with the same codes, which is subtracted (edgellama.targets.xnnpack.scales);
        None for scales that need none.
    """

    values: Tensor
    scales: Tensor
    less: Tensor | None
    zeros: Tensor
    bias: Tensor | None

    def __init__(self, codes: Codes, bias: Tensor | None, name: str = "a linear") -> None:
        super().__init__()
        self.group_size = codes.scheme.group_size
        self.code_range = (-8, 7) if codes.scheme.bits == 4 else (-128, 127)
        two = pair(codes.scales, name, grouped=self.group_size is not None)
        scales, less = two if two is not None else (codes.scales, None)
        if not self.group_size:
            scales, less = scales.reshape(-1), None if less is None else less.reshape(-1)
        self.register_buffer("values", codes.values)
        self.register_buffer("scales", scales)
        self.register_buffer("less", less)
        self.register_buffer("zeros", torch.zeros_like(scales, dtype=torch.int8))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        scales, zeros = ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
        q = ops.quantize_per_token.default(x, scales, zeros, -128, 127, torch.int8)
        x = ops.dequantize_per_token.default(q, scales, zeros, -128, 127, torch.int8, torch.float32)
        y = F.linear(x, self._weight(self.scales), self.bias)
        return y if self.less is None else y - F.linear(x, self._weight(self.less))

    def _weight(self, scales: Tensor) -> Tensor:
        ops, (low, high) = torch.ops.quantized_decomposed, self.code_range
        if self.group_size:
            weight: Tensor = ops.dequantize_per_channel_group.default(
                self.values, scales, self.zeros, low, high, torch.int8, self.group_size, torch.float32
            )
        else:
            weight = ops.dequantize_per_channel.default(
                self.values, scales, self.zeros, 0, low, high, torch.int8
            )
        return weight


class FloatLinear(nn.Module):
    """A linear in float32. A trace sees its weight as one tensor, shared with the model."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Projections(nn.Module):
    """Linears that read the same input. Equal schemes make them one linear, with the rows of all in order.

    One wide product keeps two threads busier than three narrow ones, and the input is quantized once. The
    codes do not change. Each output is the same number: a row's product does not depend on the other rows.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        if fusable(linears):
            self.linears = nn.ModuleList([_fused(linears)])
        else:
            self.linears = nn.ModuleList(_fused([linear]) for linear in linears)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """float32 [..., columns] -> one float32 [..., rows] per linear."""
        outputs = [linear(x) for linear in self.linears]
        if len(outputs) == len(self.sizes):
            return tuple(outputs)
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        return tuple(
            outputs[0].narrow(-1, start, size) for start, size in zip(starts, self.sizes, strict=True)
        )


def fusable(linears: Sequence[nn.Linear]) -> bool:
    """Returns True if all linears have the same scheme, and either all or none have a bias."""
    return len({(_scheme(linear), linear.bias is None) for linear in linears}) == 1


def _scheme(linear: nn.Linear) -> object:
    codes = codes_of(linear)
    return None if codes is None else (codes.scheme.bits, codes.scheme.group_size)


def _fused(linears: Sequence[nn.Linear]) -> nn.Module:
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    bias = _cat(biases) if biases else None
    codes = [codes_of(linear) for linear in linears]
    quantized = [c for c in codes if c is not None]
    if not quantized:
        return FloatLinear(_cat([linear.weight.detach() for linear in linears]), bias)
    values, scales = _cat([c.values for c in quantized]), _cat([c.scales for c in quantized])
    return DecomposedLinear(Codes(values, scales, quantized[0].scheme), bias)


def _cat(tensors: list[Tensor]) -> Tensor:
    """All rows in one tensor. A single tensor is returned as it is, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
