"""Arithmetic of the Core ML targets in torch: integer weights, float activations.

It computes in float32, not float16. Parity measures the artifact's own rounding, which differs between
compute units.
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
    """Context in which `model` computes as the Core ML targets do, apart from float16 rounding."""
    with replaced(model, _replacement):
        yield


def _replacement(module: nn.Module) -> nn.Module | None:
    if not isinstance(module, nn.Linear) or not isinstance(module.weight, IntxUnpackedToInt8Tensor):
        return None
    codes = codes_of(module)
    return None if codes is None else WeightOnlyLinear(codes, module.bias)
