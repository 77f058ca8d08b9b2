"""Rounding of activations that a target applies between two linears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edgellama.recipe import Scheme


@dataclass(frozen=True)
class ActivationRounding:
    """What a target's arithmetic rounds between its float32 sums.

    inputs: of a linear with a scheme, float32 [..., columns]. heads: q, k or v as attention reads them, float32 [..., D].
    """

    inputs: Callable[[Tensor, Scheme], Tensor]
    heads: Callable[[Tensor], Tensor] = lambda x: x


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 per token, asymmetric: (x / scale as float32 integers with the zero point subtracted, scale [..., 1]).

    The formula of XNNPACK's src/xnnpack/quantization.h: the zero point is chosen at the end of the range where it
    errs less, and x is multiplied by the reciprocal scale that came first.
    """
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    # torch.div, because `255 / x` is 255 * (1 / x) in torch and rounds twice.
    reciprocal = torch.where(low == high, 1.0, torch.div(torch.tensor(255.0), high - low))
    low, high = low * reciprocal, high * reciprocal
    zero_point = torch.where((-128 + low) + (127 + high) > 0, -128 - low, 127 - high)
    zero_point = zero_point.clamp(-128, 127).round()
    q = (x * reciprocal).clamp(-128 - zero_point, 127 - zero_point).round()
    return q, 1 / reciprocal


def int8_per_token(x: Tensor, scheme: Scheme) -> Tensor:
    """Inputs as a linear with `scheme` sees them."""
    if not scheme.int8_activations:
        return x
    values, scale = quantize_activations(x)
    return values * scale


def int8_per_head(x: Tensor) -> Tensor:
    """q, k or v as an int8 cache and its attention see them: float32 [..., D], each head of each token on its own.

    The formula of ExecuTorch's quantized_decomposed::choose_qparams_per_token_asymmetric, scale and zero point per row
    of D values. llama::custom_quantized_sdpa then computes on these numbers; the order of its sums apart, that is
    attention in float32.
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
