"""The arithmetic of the Core ML targets in torch: integer weights, float activations.

float32 and not float16: the artifact's own rounding is part of what parity measures, and differs from one compute
unit to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from edgellama.export.quantization.tensors import codes_of
from edgellama.model.llama import Llama
from edgellama.model.quantized import Codes
from edgellama.model.swap import replaced
from edgellama.recipe import Recipe


class WeightOnlyLinear(nn.Module):
    """A quantized linear whose input stays float. Codes become float32 at each call, so that they cost no memory."""

    def __init__(self, codes: Codes, bias: Tensor | None) -> None:
        super().__init__()
        self.codes, self.bias = codes, bias

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., columns] -> float32 [..., rows]."""
        return F.linear(x, self.codes.dequantize(), self.bias)


@contextmanager
def coreml_numerics(model: Llama, recipe: Recipe | None = None) -> Iterator[None]:
    """`model` computed as the Core ML targets compute it, but for float16 rounding, for the duration."""
    with replaced(model, _replacement):
        yield


def _replacement(module: nn.Module) -> nn.Module | None:
    if not isinstance(module, nn.Linear) or not isinstance(module.weight, IntxUnpackedToInt8Tensor):
        return None
    codes = codes_of(module)
    return None if codes is None else WeightOnlyLinear(codes, module.bias)
