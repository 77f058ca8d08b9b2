"""Arithmetic of target `onnx` in torch.

In form `ort`, MatMulNBits at accuracy level 4 quantizes its input to int8. Its kernel decides over which values a
scale extends (targets/onnx/rounding_probe.py measures it):

- `per-block`, on x86-64: symmetric, in the blocks of the weight. The scale is absmax / 127, and halves round to even.
- `per-row`, of KleidiAI on Arm with dotprod: int4 weights get inputs in XNNPACK's formula, asymmetric with one scale
  a row. Int8 weights get them per block.
- `float`, on Arm without dotprod: no rounding.

Products are summed as integers. Everything else is float32, as is all of form `portable`. The one remaining
difference from the artifact is the order in which blocks are summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from edgellama.model.activations import NO_ROUNDING, ActivationRounding, quantize_activations
from edgellama.model.held import converted
from edgellama.model.llama import Llama
from edgellama.model.quantized import Codes, WeightOnlyLinear, codes_of
from edgellama.model.swap import replaced
from edgellama.recipe import Scheme
from edgellama.targets.onnx.families import FLOAT, KLEIDIAI_BLOCK, PER_BLOCK, PER_ROW
from edgellama.targets.onnx.interface import block_size


def quantize_blocks(x: Tensor, block: int) -> Tensor:
    """Rounds float32 [..., n] as the kernel does: each block of n to 255 levels of its largest magnitude."""
    blocks = x.unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True)
    # torch.div, because `127 / x` is 127 * (1 / x) in torch and rounds twice.
    reciprocal = torch.where(largest == 0, 0.0, torch.div(torch.tensor(127.0), largest))
    rounded: Tensor = (blocks * reciprocal).round() * torch.div(largest, 127.0)
    return rounded.flatten(-2)


def inputs_per_block(x: Tensor, scheme: Scheme) -> Tensor:
    """Rounds the input of a linear with `scheme` per block of its weight, float32 [..., columns]."""
    return quantize_blocks(x, block_size(scheme, x.shape[-1]))


def inputs_of_kleidiai(x: Tensor, scheme: Scheme) -> Tensor:
    """Rounds the input of a linear with `scheme` as KleidiAI does, float32 [..., columns].

    It takes int4 weights in blocks of whole 32s. Others are left to the kernels per block.
    """
    if scheme.bits != 4 or block_size(scheme, x.shape[-1]) % KLEIDIAI_BLOCK:
        return inputs_per_block(x, scheme)
    values, scale = quantize_activations(x)
    return values * scale


ROUNDINGS = {
    PER_BLOCK: ActivationRounding(inputs_per_block),
    PER_ROW: ActivationRounding(inputs_of_kleidiai),
    FLOAT: NO_ROUNDING,
}


class RoundedLinear(nn.Module):
    """A quantized linear whose input is rounded as a kernel rounds it."""

    def __init__(self, codes: Codes, bias: Tensor | None, rounding: ActivationRounding) -> None:
        super().__init__()
        self.codes, self.bias, self.rounding = codes, bias, rounding

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., columns] -> float32 [..., rows]."""
        weight = converted(self.codes, self.codes.dequantize)
        return F.linear(self.rounding.inputs(x, self.codes.scheme), weight, self.bias)


@contextmanager
def onnx_numerics(model: Llama, rounding: ActivationRounding | None) -> Iterator[None]:
    """Context in which `model` computes as target `onnx` does. rounding: None for floats."""

    def replacement(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.Linear) or not isinstance(module.weight, IntxUnpackedToInt8Tensor):
            return None
        codes = codes_of(module)
        if codes is None:
            return None
        if rounding is None:
            return WeightOnlyLinear(codes, module.bias)
        return RoundedLinear(codes, module.bias, rounding)

    with replaced(model, replacement):
        yield
