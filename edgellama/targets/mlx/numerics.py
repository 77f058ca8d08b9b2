"""Arithmetic of target `mlx` in torch: integer weights, float activations, floats as the file holds them.

Norms, biases and float weights have the 16 bits of the file, and everything is computed in float32, as the
runtime on CPUs does. The rounding of a GPU's 16-bit activations is left out: it differs between kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from edgellama.model.llama import Llama, RMSNorm
from edgellama.model.quantized import WeightOnlyLinear, codes_of
from edgellama.model.swap import replaced
from edgellama.recipe import Recipe
from edgellama.targets.mlx.interface import DTYPES


@contextmanager
def stored_floats(model: Llama, recipe: Recipe) -> Iterator[None]:
    """Context in which norms, biases and float weights of `model` are those of the file."""
    dtype = DTYPES[recipe.mlx_dtype]

    def stored(values: Tensor) -> nn.Parameter:
        return nn.Parameter(values.detach().to(dtype).float(), requires_grad=False)

    def replacement(module: nn.Module) -> nn.Module | None:
        if isinstance(module, RMSNorm):
            norm = RMSNorm(len(module.weight), module.eps)
            norm.weight = stored(module.weight)
            return norm
        if isinstance(module, nn.Embedding):
            return nn.Embedding.from_pretrained(stored(module.weight))  # type: ignore[no-any-return]
        if not isinstance(module, nn.Linear):
            return None
        quantized = isinstance(module.weight, IntxUnpackedToInt8Tensor)
        if quantized and module.bias is None:
            return None
        with torch.device("meta"):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        linear.weight = module.weight if quantized else stored(module.weight)
        if module.bias is not None:
            linear.bias = stored(module.bias)
        return linear

    with replaced(model, replacement):
        yield


@contextmanager
def mlx_numerics(model: Llama, recipe: Recipe) -> Iterator[None]:
    """Context in which `model` computes as target `mlx` does."""
    with stored_floats(model, recipe), replaced(model, _weight_only):
        yield


def _weight_only(module: nn.Module) -> nn.Module | None:
    if not isinstance(module, nn.Linear) or not isinstance(module.weight, IntxUnpackedToInt8Tensor):
        return None
    codes = codes_of(module)
    return None if codes is None else WeightOnlyLinear(codes, module.bias)
