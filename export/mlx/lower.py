"""Quantized model -> model.safetensors and config.json, for MLX on Apple GPUs.

The codes are not chosen again. MLX counts codes from 0 and adds a bias to each group, so a code is stored
with 8 or 128 added and the bias is that many scales below zero. This is exact: a power of two times a
scale has the bits of the scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from edgellama.errors import LoweringError
from edgellama.files import to_json
from edgellama.formats.safetensors_file import TensorSource, write_safetensors
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.model.quantized import Codes, QuantizedEmbedding, codes_of
from edgellama.targets.mlx.interface import (
    CONFIG_FILE,
    DTYPES,
    WEIGHTS_FILE,
    config_data,
    group_size,
    has_lm_head,
    metadata,
)
from edgellama.targets.provenance import Provenance


def lower_to_mlx(model: Llama, path: Path, provenance: Provenance, *, progress: Progress) -> None:
    """Writes the quantized `model` into the directory `path`. The model does not change.

    Raises LoweringError for a number that the recipe's `mlx_dtype` cannot hold, by name.
    """
    recipe = provenance.recipe
    dtype = DTYPES[recipe.mlx_dtype]
    path.mkdir()
    with progress.stage("lower"):
        apart = has_lm_head(model.config, recipe)
        tensors = dict(_tensors(model, dtype, with_head=apart))
    with progress.stage("write"):
        write_safetensors(path / WEIGHTS_FILE, tensors, metadata(model, provenance))
        (path / CONFIG_FILE).write_text(to_json(config_data(model.config, recipe)), encoding="utf-8")


def pack(values: Tensor, bits: int) -> Tensor:
    """Packs int8 codes [rows, columns] into uint32 words, the first code in the lowest bits."""
    shifted = values.view(torch.uint8) + (1 << (bits - 1))  # wraps around
    if bits == 4:
        shifted = shifted[:, 0::2] | (shifted[:, 1::2] << 4)
    return shifted.contiguous().view(torch.uint32)


def held(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype`. Raises LoweringError if one of them changes."""
    stored = values.to(dtype)
    if not torch.equal(stored.float(), values):
        bad = values[stored.float() != values][0].item()
        raise LoweringError(
            f"{name}: {bad!r} has no exact {str(dtype).removeprefix('torch.')}",
            remedy='Use a recipe with "mlx_dtype": "bfloat16", which holds every scale that edgellama chooses.'
            if dtype == torch.float16
            else 'Use a recipe with "mlx_dtype": "float16", or leave out target mlx.',
        )
    return stored


def _tensors(model: Llama, dtype: torch.dtype, *, with_head: bool) -> Iterator[tuple[str, TensorSource]]:
    for name, module in model.named_modules():
        if name == "lm_head" and not with_head:
            _check_tied(model)
            continue
        if isinstance(module, (nn.Linear, nn.Embedding, QuantizedEmbedding)):
            codes = codes_of(module)
            if codes is not None:
                yield from _quantized(name, codes, dtype)
            else:
                yield _float(f"{name}.weight", module.get_parameter("weight"), dtype)
            if isinstance(module, nn.Linear) and module.bias is not None:
                yield _float(f"{name}.bias", module.bias, dtype)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and name.endswith("norm.weight"):
            yield _float(name, weight, dtype)


def _check_tied(model: Llama) -> None:
    one, other = codes_of(model.model.embed_tokens), codes_of(model.lm_head)
    if one is None or other is None:
        same = torch.equal(model.model.embed_tokens.get_parameter("weight"), model.lm_head.weight)
    else:
        same = torch.equal(one.values, other.values) and torch.equal(one.scales, other.scales)
    if not same:
        raise LoweringError(
            "lm_head: its codes differ from those of the embedding that it is tied to",
            remedy="This is a defect of edgellama; report it with the recipe.",
        )


def _quantized(name: str, codes: Codes, dtype: torch.dtype) -> Iterator[tuple[str, TensorSource]]:
    rows, columns = codes.values.shape
    bits = codes.scheme.bits
    groups = columns // group_size(codes.scheme, columns)
    scales = held(f"{name}.scales", codes.scales, dtype)
    biases = held(f"{name}.biases", codes.scales * -(1 << (bits - 1)), dtype)
    yield (
        f"{name}.weight",
        TensorSource((rows, columns * bits // 32), torch.uint32, lambda: pack(codes.values, bits)),
    )
    for part, values in (("scales", scales), ("biases", biases)):
        repeats = groups // values.shape[1]
        yield (
            f"{name}.{part}",
            TensorSource(
                (rows, groups),
                dtype,
                lambda values=values, repeats=repeats: values.repeat_interleave(repeats, 1),  # type: ignore[misc]
            ),
        )


def _float(name: str, values: Tensor, dtype: torch.dtype) -> tuple[str, TensorSource]:
    """A float tensor, rounded. Raises LoweringError if it becomes infinite."""
    source = values.detach()
    if not bool(torch.isfinite(source.to(dtype)).all()):
        raise LoweringError(
            f"{name}: a value of {source.abs().max().item():g} is beyond {str(dtype).removeprefix('torch.')}",
            remedy='Use a recipe with "mlx_dtype": "bfloat16".',
        )
    return name, TensorSource(tuple(source.shape), dtype, lambda: source.to(dtype))
