"""Quantized model with trainable scales and norm weights. Codes are frozen.

Each scale is its start value times (1 + change), rounded to bfloat16. The gradient ignores this rounding
(straight-through). Inputs of linears are quantized to int8 per token, as in target `xnnpack`. The embedding
and the lm_head may share their codes, so they are not trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellama.model.activations import quantize_activations
from edgellama.model.llama import KVCache, Llama, RMSNorm
from edgellama.model.quantized import Codes, apply_codes, check_codes, codes_of
from edgellama.model.swap import replaced

CHANGE = 0.5  # largest relative change of a scale, up or down


class _Product(torch.autograd.Function):
    """x @ W'. Forward and backward both dequantize W: autograd saves the input, but no float weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, tuned: bool) -> Tensor:
        """x float32 [..., columns], codes as integers [rows, columns], scales float32 [rows, groups]."""
        ctx.save_for_backward(x, codes, scales)
        ctx.tuned = tuned
        return F.linear(x, _dequantized(codes, scales))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        x, codes, scales = ctx.saved_tensors
        to_x = gradient @ _dequantized(codes, scales)
        if not ctx.tuned:
            return to_x, None, None, None
        rows, columns = codes.shape
        to_weight = gradient.reshape(-1, rows).T @ x.reshape(-1, columns)
        grouped = to_weight.reshape(rows, scales.shape[1], -1)
        return to_x, None, (grouped * codes.reshape(grouped.shape)).sum(-1), None


def _dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    rows, columns = codes.shape
    grouped: Tensor = codes.float().reshape(rows, scales.shape[1], -1) * scales[..., None]
    return grouped.reshape(rows, columns)


def _straight(rounded: Tensor, exact: Tensor) -> Tensor:
    """Straight-through estimator: the value of `rounded`, the gradient of `exact`."""
    return exact + (rounded - exact).detach()


class TunedLinear(nn.Module):
    """Quantized linear with trainable scales.

    scale_change: relative change of the scales, float32 [rows, groups], 0 at first. None if they are not
    trained.
    """

    values: Tensor
    start_scales: Tensor
    scale_change: Tensor | None

    def __init__(self, codes: Codes, bias: Tensor | None, *, tuned: bool) -> None:
        super().__init__()
        self.scheme, self.bias = codes.scheme, bias
        self.register_buffer("values", codes.values)
        self.register_buffer("start_scales", codes.scales)
        self.scale_change = nn.Parameter(torch.zeros_like(codes.scales)) if tuned else None

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., columns] -> float32 [..., rows]."""
        if self.scheme.int8_activations:
            with torch.no_grad():
                values, scale = quantize_activations(x)
            x = _straight(values * scale, x)
        arguments = x, self.values, self.scales(), self.scale_change is not None
        y: Tensor = _Product.apply(*arguments)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def scales(self) -> Tensor:
        """Scales in use: bfloat16 numbers in a float32 tensor [rows, groups]."""
        if self.scale_change is None:
            return self.start_scales
        exact = self.start_scales * (1 + self.scale_change.clamp(-CHANGE, CHANGE))
        rounded = exact.detach().to(torch.bfloat16).float().clamp_min(self.start_scales.min())
        return _straight(rounded, exact)


class TunedNorm(nn.Module):
    """RMSNorm with a trainable weight: its start value times (1 + change)."""

    start: Tensor

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.register_buffer("start", norm.weight.detach())
        self.change = nn.Parameter(torch.zeros_like(self.start))

    @property
    def weight(self) -> Tensor:
        return self.start * (1 + self.change)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class _Attention(nn.Module):
    """Causal attention over a whole text without a KV cache. Equals an empty KVCache."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        groups = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return y.transpose(1, 2)


@contextmanager
def stateless(model: Llama) -> Iterator[None]:
    """Removes the KV caches of `model` inside the block.

    Each call then sees only its own tokens, and calls may run in parallel.
    """
    with replaced(model, lambda module: _Attention() if isinstance(module, KVCache) else None):
        yield


@contextmanager
def tunable(model: Llama) -> Iterator[dict[str, nn.Parameter]]:
    """Puts tunable modules into `model` inside the block, and yields the trainable parameters by name.

    KV caches are removed, as in `stateless`.
    """

    def replacement(module: nn.Module) -> nn.Module | None:
        if isinstance(module, RMSNorm):
            return TunedNorm(module)
        if isinstance(module, KVCache):
            return _Attention()
        if not isinstance(module, nn.Linear):
            return None
        codes = codes_of(module)
        if codes is None:
            return None
        return TunedLinear(codes, module.bias, tuned=module is not model.lm_head)

    with replaced(model, replacement):
        yield {
            name: parameter
            for name, parameter in model.named_parameters()
            if name.endswith(("scale_change", "norm.change"))
        }


def tuned_values(model: Llama) -> dict[str, Tensor]:
    """Current scales and norm weights of a tunable model, by module name."""
    values: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, TunedLinear) and module.scale_change is not None:
            values[name] = module.scales().detach().cpu()
        elif isinstance(module, TunedNorm):
            values[name] = module.weight.detach().cpu()
    return values


def apply_tuned(model: Llama, tuned: Mapping[str, Tensor]) -> None:
    """Sets scales and norm weights of a quantized `model`, by module name, in place."""
    for name, values in tuned.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            codes = codes_of(module)
            assert codes is not None
            tuned_codes = replace(codes, scales=values)
            check_codes(name, tuned_codes)
            apply_codes(model, name, tuned_codes)
        else:
            module.weight = nn.Parameter(values, requires_grad=False)
