"""Quantized checkpoints of the tiny model: those of AutoRound, and others packed by hand.

`tests/tiny_llama/quantized` holds one layer of the tiny model as auto-round 0.16.1 wrote it, in three layouts. In
`expected.json` stand the hashes of the dequantized weights, by the decoders of auto-round and compressed-tensors.
The layouts of GPTQ are packed here by their documents (AutoGPTQ's and GPTQModel's `pack`), without those packages.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Ggml
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgellama.checkpoints import Checkpoint
from edgellama.formats.gguf_names import ggml_name, is_rotated, permute
from tests.helpers.paths import TINY

QUANTIZED = TINY.parent / "quantized"
PACKAGES = ("auto_round", "awq", "compressed_tensors")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

Weights = dict[str, Tensor]
Edit = Callable[[Weights, dict[str, Any]], object]  # of the tensors and of quantization_config, in place


def package_checkpoint(directory: Path, package: str, edit: Edit | None = None) -> Path:
    """One of AutoRound's checkpoints with the tokenizer beside it, perhaps altered."""
    source = QUANTIZED / package
    return _written(directory, load_file(source / "model.safetensors"), source / "config.json", edit=edit)


def expected_hashes(package: str) -> dict[str, str]:
    """sha256 of the dequantized weights float32 [rows, columns], by module. Zeros are positive."""
    data = json.loads((QUANTIZED / package / "expected.json").read_text())
    return dict(data["dequantized_sha256"])


def codes_by_hand(group: int | None, bits: int = 4, scales: torch.dtype = torch.float16) -> dict[str, Any]:
    """Codes and scales of every linear of the tiny model's first layer, drawn at random: (codes, scales) by module."""
    generator, made = torch.Generator().manual_seed(7), {}
    for name, weight in load_file(QUANTIZED / "auto_round" / "model.safetensors").items():
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            rows, columns = weight.shape[1], weight.shape[0] * 32
            groups = 1 if group is None else columns // group
            low, high = -(1 << (bits - 1)), 1 << (bits - 1)
            values = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)
            signs = torch.randint(0, 2, (rows, groups), generator=generator) * 2 - 1
            sizes = 0.01 + 0.02 * torch.rand(rows, groups, generator=generator)
            made[module] = values, (signs * sizes * 16 / (1 << bits)).to(scales)
    return made


def gptq_checkpoint(
    directory: Path,
    codes: Mapping[str, Any],
    *,
    version: int = 1,
    bits: int = 4,
    group: int | None = 32,
    edit: Edit | None = None,
    **settings: Any,
) -> Path:
    """GPTQ's layout of the given codes: `qweight`, `qzeros`, `scales` and `g_idx`."""
    tensors = _floats()
    middle = 1 << (bits - 1)
    for module, (values, scales) in codes.items():
        rows, columns = values.shape
        groups = scales.shape[1]
        zeros = torch.full((groups, rows), middle - (version == 1), dtype=torch.int64)
        tensors |= {
            f"{module}.qweight": packed(values.long().t() + middle, bits, 0),
            f"{module}.qzeros": packed(zeros, bits, 1),
            f"{module}.scales": scales.t().contiguous(),
            f"{module}.g_idx": (torch.arange(columns) // (columns // groups)).to(torch.int32),
        }
    data = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1 if group is None else group,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "meta": {"quantizer": ["gptqmodel:4.0.0"]},
        **settings,
    }
    return _written(directory, tensors, QUANTIZED / "auto_round" / "config.json", settings=data, edit=edit)


def packed(numbers: Tensor, bits: int, axis: int) -> Tensor:
    """Unsigned numbers packed along an axis into int32 words, one after the other from the lowest bits."""
    moved = numbers.movedim(axis, -1)
    words = moved.reshape(*moved.shape[:-1], -1, 32 // bits)
    total = sum(words[..., i] << (bits * i) for i in range(32 // bits))
    assert isinstance(total, Tensor)
    signed = torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)
    return signed.movedim(-1, axis).contiguous()


def gguf_checkpoint(path: Path, checkpoint: Checkpoint, kinds: Mapping[str, str], default: str) -> Path:
    """A GGUF file of a checkpoint, quantized by the gguf package's own functions, with the tiny tokenizer.

    kinds: type by a module's name; `default` for other linears. Norms are F32.
    """
    from edgellama.checkpoints.weights import load_llama
    from edgellama.export.gguf.lower import _add
    from edgellama.export.gguf.tokenizer import tokenizer_keys
    from edgellama.recipe import RECIPES
    from edgellama.targets.gguf.interface import model_keys
    from tests.helpers.tiny_models import CONTEXT, provenance

    model = load_llama(checkpoint, CONTEXT)
    keys = model_keys(model, provenance(RECIPES["fp32"])) | tokenizer_keys(
        checkpoint.tokenizer, checkpoint.config
    )
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        if not key.startswith("edgellama."):
            _add(writer, key, value)
    for name in checkpoint.config.tensor_shapes():
        weight = checkpoint.tensor(name)
        if is_rotated(name):
            weight = permute(weight, checkpoint.config.head_dim)
        kind = Ggml["F32"]
        if weight.dim() == 2:
            kind = Ggml[kinds.get(name.removesuffix(".weight"), default)]
        array = np.ascontiguousarray(weight.numpy())
        stored = array if kind == Ggml.F32 else gguf.quants.quantize(array, kind)
        writer.add_tensor(ggml_name(name), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _floats() -> Weights:
    stored = load_file(QUANTIZED / "auto_round" / "model.safetensors")
    return {name: tensor for name, tensor in stored.items() if name.endswith(".weight")}


def _written(
    directory: Path,
    tensors: Weights,
    config: Path,
    *,
    settings: dict[str, Any] | None = None,
    edit: Edit | None = None,
) -> Path:
    data = json.loads(config.read_text())
    chosen = data["quantization_config"] if settings is None else settings
    if edit is not None:
        edit(tensors, chosen)
    directory.mkdir()
    for name in TOKENIZER:
        shutil.copy(TINY / name, directory)
    (directory / "config.json").write_text(json.dumps(data | {"quantization_config": chosen}))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors"
    )
    return directory
