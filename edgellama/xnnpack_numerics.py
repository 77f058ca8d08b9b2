"""XNNPACK's arithmetic for quantized linears, in torch: what parity compares a .pte with.

torchao's emulation agrees with XNNPACK to float32 rounding, but a rounding that differs in the last bit may flip an
int8 activation, and a flip is amplified by every layer. Here activations are quantized by XNNPACK's own formula and
products are summed exactly, as its int32 accumulators do, so flips become rare: over the first 64 tokens of six
texts, a two-layer cut of SmolLM2-135M went from a mean KL of 2e-3 (torchao) to 3e-4, with most texts at 3e-13.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from edgellama.llama import Llama

# Products |activation - zero point| * |code| are at most 255 * 127, so float32 holds any sum of this many exactly.
_EXACT_COLUMNS = 512


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 per token, asymmetric: (x / scale as float32 integers with the zero point subtracted, scale [..., 1]).

    The formula of XNNPACK's src/xnnpack/quantization.h: the zero point is chosen at the end of the range where it
    errs less, and x is multiplied by the reciprocal scale that came first.
    """
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    reciprocal = torch.where(low == high, torch.ones_like(low), 255 / (high - low))
    low, high = low * reciprocal, high * reciprocal
    zero_point = torch.where((-128 + low) + (127 + high) > 0, -128 - low, 127 - high)
    zero_point = zero_point.clamp(-128, 127).round()
    q = (x * reciprocal).clamp(-128 - zero_point, 127 - zero_point).round()
    return q, 1 / reciprocal


class XnnpackLinear(nn.Module):
    """A quantized linear with exact integer sums. Weights are kept as float32 [groups, group_size, rows]."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: IntxUnpackedToInt8Tensor, bias: Tensor | None) -> None:
        super().__init__()
        rows, columns = weight.shape
        group = weight.block_size[1]
        self.grouped = group != columns
        width = group if self.grouped else columns
        self.codes = weight.qdata.float().reshape(rows, columns // width, width).permute(1, 2, 0).contiguous()
        self.scales = weight.scale.t()[:, None, :].contiguous()  # [groups, 1, rows]
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., columns] -> float32 [..., rows]."""
        q, scale = quantize_activations(x)
        groups, width, rows = self.codes.shape
        flat, scale = q.reshape(-1, groups * width), scale.reshape(-1, 1)
        if self.grouped:
            sums = torch.bmm(flat.reshape(-1, groups, width).transpose(0, 1), self.codes)  # [groups, T, rows]
            y = (sums * self.scales).sum(0) * scale
        else:
            total = torch.zeros(flat.shape[0], rows, dtype=torch.float64)
            for start in range(0, width, _EXACT_COLUMNS):
                piece = slice(start, start + _EXACT_COLUMNS)
                total += flat[:, piece] @ self.codes[0, piece]
            y = total.float() * scale * self.scales[0]
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], rows)


@contextmanager
def xnnpack_numerics(model: Llama) -> Iterator[None]:
    """`model` with its quantized linears computed as XNNPACK computes them, for the duration."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and isinstance(module.weight, IntxUnpackedToInt8Tensor):
            parent_name, _, attribute = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            replaced.append((parent, attribute, module))
            setattr(parent, attribute, XnnpackLinear(module.weight, module.bias))
    try:
        yield
    finally:
        for parent, attribute, module in replaced:
            setattr(parent, attribute, module)
