"""The arithmetic of the Core ML targets in torch: integer weights, float activations.

float32 and not float16: the artifact's own rounding is part of what parity measures, and differs from one compute
unit to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from edgellama.model.llama import Llama
from edgellama.model.quantized import WeightOnlyLinear, codes_of
from edgellama.model.swap import replaced
from edgellama.recipe import Recipe


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
