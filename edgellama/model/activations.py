"""Activation quantization, as each target applies it between two linears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edgellama.recipe import Scheme


@dataclass(frozen=True)
class ActivationRounding:
    """Roundings that a target applies between its float32 sums.

    inputs: rounds the input of a linear with a scheme, float32 [..., columns].
    heads: rounds q, k or v as attention reads them, float32 [..., D].
    """

    inputs: Callable[[Tensor, Scheme], Tensor]
    heads: Callable[[Tensor], Tensor] = lambda x: x


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes float32 [..., columns] to int8 per token, asymmetric. Returns (codes, scale).

    codes: x / scale as integers in float32, with the zero point subtracted.
    scale: float32 [..., 1].

    Same formula as XNNPACK's src/xnnpack/quantization.h. The zero point is computed at the end of the range
    where its error is smaller. The reciprocal scale is computed first, and x is multiplied by it.
    """
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    # torch.div, because torch computes `255 / x` as 255 * (1 / x), which rounds twice.
    reciprocal = torch.where(low == high, 1.0, torch.div(torch.tensor(255.0), high - low))
    low, high = low * reciprocal, high * reciprocal
    zero_point = torch.where((-128 + low) + (127 + high) > 0, -128 - low, 127 - high)
    zero_point = zero_point.clamp(-128, 127).round()
    q = (x * reciprocal).clamp(-128 - zero_point, 127 - zero_point).round()
    return q, 1 / reciprocal


def int8_per_token(x: Tensor, scheme: Scheme) -> Tensor:
    """Inputs of a linear with `scheme`, rounded to int8 per token if the scheme says so."""
    if not scheme.int8_activations:
        return x
    values, scale = quantize_activations(x)
    return values * scale


def int8_per_head(x: Tensor) -> Tensor:
    """Rounds q, k or v, float32 [..., D], as an int8 KV cache stores them and its attention reads them.

    Each head of each token has its own scale and zero point, for its row of D values. Same formula as
    ExecuTorch's `quantized_decomposed::choose_qparams_per_token_asymmetric`. `llama::custom_quantized_sdpa`
    computes on these numbers, which equals float32 attention but for the order of the sums.
    """
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / 255.0).clamp_min(torch.finfo(torch.float32).eps)
    below, above = low / scale, high / scale
    zero_point = torch.where((-128 + below) + (127 + above) > 0, -128 - below, 127 - above)
    zero_point = zero_point.clamp(-128, 127).round()
    q = (x.double() * (1.0 / scale.double()) + zero_point).round().clamp(-128, 127).float()
    return (q - zero_point) * scale


INT8_PER_TOKEN = ActivationRounding(int8_per_token)


NO_ROUNDING = ActivationRounding(lambda x, scheme: x)
