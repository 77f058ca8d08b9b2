"""Arithmetic of target `onnx` in torch.

In form `ort`, MatMulNBits at accuracy level 4 quantizes its input to int8, symmetric, in the blocks of its
weight. The scale is absmax / 127, and halves round to even. The products of a block are summed as integers,
by the CompInt8 kernels of MLAS. In 2026's x86-64 builds that holds for one token and for many. Everything
else is float32, as is all of form `portable`. The one remaining difference from the artifact is the order in
which blocks are summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from edgellama.model.activations import ActivationRounding
from edgellama.model.llama import Llama
from edgellama.model.quantized import Codes, WeightOnlyLinear, codes_of
from edgellama.model.swap import replaced
from edgellama.recipe import Recipe
from edgellama.targets.onnx.interface import block_size


def quantize_blocks(x: Tensor, block: int) -> Tensor:
    """Rounds float32 [..., n] as the kernel does: each block of n to 255 levels of its largest magnitude."""
    blocks = x.unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True)
    # torch.div, because `127 / x` is 127 * (1 / x) in torch and rounds twice.
    reciprocal = torch.where(largest == 0, 0.0, torch.div(torch.tensor(127.0), largest))
    rounded: Tensor = (blocks * reciprocal).round() * torch.div(largest, 127.0)
    return rounded.flatten(-2)


def rounding(recipe: Recipe) -> ActivationRounding | None:
    """Rounding of the inputs of linears in form `ort`. None for form `portable`, which rounds nothing."""
    if recipe.onnx_form != "ort":
        return None
    return ActivationRounding(lambda x, scheme: quantize_blocks(x, block_size(scheme, x.shape[-1])))


class BlockwiseLinear(nn.Module):
    """A quantized linear whose input is quantized in the weight's blocks."""

    def __init__(self, codes: Codes, bias: Tensor | None) -> None:
        super().__init__()
        self.codes, self.bias = codes, bias
        self.block = block_size(codes.scheme, codes.values.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., columns] -> float32 [..., rows]."""
        return F.linear(quantize_blocks(x, self.block), self.codes.dequantize(), self.bias)


@contextmanager
def onnx_numerics(model: Llama, recipe: Recipe) -> Iterator[None]:
    """Context in which `model` computes as target `onnx` does."""
    linear = BlockwiseLinear if recipe.onnx_form == "ort" else WeightOnlyLinear

    def replacement(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.Linear) or not isinstance(module.weight, IntxUnpackedToInt8Tensor):
            return None
        codes = codes_of(module)
        return None if codes is None else linear(codes, module.bias)

    with replaced(model, replacement):
        yield
