"""Interface of edgellama's GGUF files: their keys and tensors. The export writes them, the gate expects them.

The keys of the tokenizer are not here: they follow from the tokenizer's files (export/gguf/tokenizer.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgellama.formats.gguf_names import ROPE_FACTORS, ggml_name, is_rotated, permute
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import Llama, RMSNorm, inverse_frequencies
from edgellama.model.quantized import Codes, codes_of

if TYPE_CHECKING:
    from edgellama.targets.provenance import Provenance

# edgellama's own keys, which llama.cpp ignores.
CONTEXT_LENGTH = "edgellama.context_length"
MANIFEST_SHA256 = "edgellama.manifest_sha256"
RECIPE = "edgellama.recipe"
SOURCE_SHA256 = "edgellama.source_sha256"
VERSION = "edgellama.version"

TOKENIZER = "tokenizer."  # prefix of the keys that describe the tokenizer
TYPES = {4: "Q4_0", 8: "Q8_0"}  # of quantized weights, by their bits
_FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "F32": 0}  # llama.h, `enum llama_ftype`: the type of most weights
_QUANTIZATION_VERSION = 2  # of the block layouts

Value = str | bool | int | float | list[str] | list[int] | list[float]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor as the file holds it.

    Attributes:
        name: in GGUF.
        source: Hugging Face's name, or `rope_freqs.weight`.
        codes: codes and scales, with rows in the file's order; None for floats.
        floats: float32 values with rows in the file's order; None for codes.
    """

    name: str
    source: str
    codes: Codes | None = None
    floats: Tensor | None = None

    @property
    def kind(self) -> str:
        """GGUF's type."""
        return "F32" if self.codes is None else TYPES[self.codes.scheme.bits]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [rows, columns] or [n]."""
        tensor = self.floats if self.codes is None else self.codes.values
        assert tensor is not None
        return tuple(tensor.shape)


def tensors(model: Llama) -> Iterator[PlannedTensor]:
    """Every tensor of the file, in its order. A tied table that is quantized alike on both sides comes once."""
    factors = rope_factors(model.config)
    if factors is not None:
        yield PlannedTensor(ROPE_FACTORS, ROPE_FACTORS, floats=factors)
    for name, module in model.named_modules():
        if name == "lm_head" and is_tied(model):
            continue
        yield from _of_module(name, module, model.config.head_dim)


def _of_module(name: str, module: nn.Module, head_dim: int) -> Iterator[PlannedTensor]:
    if isinstance(module, RMSNorm):
        yield _floats(f"{name}.weight", module.weight)
        return
    if name != "model.embed_tokens" and not isinstance(module, nn.Linear):
        return
    codes, weight = codes_of(module), f"{name}.weight"
    if codes is None:
        yield _floats(weight, module.get_parameter("weight"), head_dim)
    else:
        if is_rotated(name):
            codes = Codes(permute(codes.values, head_dim), permute(codes.scales, head_dim), codes.scheme)
        yield PlannedTensor(ggml_name(weight), weight, codes=codes)
    if getattr(module, "bias", None) is not None:
        yield _floats(f"{name}.bias", module.get_parameter("bias"), head_dim)


def _floats(name: str, parameter: Tensor, head_dim: int = 2) -> PlannedTensor:
    values = parameter.detach().float()
    return PlannedTensor(
        ggml_name(name), name, floats=permute(values, head_dim) if is_rotated(name) else values
    )


def is_tied(model: Llama) -> bool:
    """Returns True if one table in the file serves the embedding and lm_head."""
    if not model.config.tie_word_embeddings:
        return False
    table, head = codes_of(model.model.embed_tokens), codes_of(model.lm_head)
    if table is None or head is None:
        return table is head
    return torch.equal(table.values, head.values) and torch.equal(table.scales, head.scales)


def rope_factors(config: LlamaConfig) -> Tensor | None:
    """Divisor of each rotary frequency, float32 [D / 2], for schemes that are no plain or linear RoPE."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "linear":
        return None
    if scaling.rope_type == "frequency_factors":
        return torch.tensor(scaling.factors, dtype=torch.float32)
    plain = inverse_frequencies(_without_scaling(config)).double()
    return (plain / inverse_frequencies(config).double()).float()


def _without_scaling(config: LlamaConfig) -> LlamaConfig:
    return LlamaConfig(**{**vars(config), "rope_scaling": None})


def model_keys(model: Llama, provenance: Provenance) -> dict[str, Value]:
    """Keys of the file but for the tokenizer's, in order."""
    config = model.config
    kinds = {tensor.kind for tensor in tensors(model)}
    kind = next(kind for kind in _FILE_TYPES if kind in kinds)
    keys: dict[str, Value] = {
        "general.type": "model",
        "general.file_type": _FILE_TYPES[kind],
        **({} if kind == "F32" else {"general.quantization_version": _QUANTIZATION_VERSION}),
        **({} if provenance.license is None else {"general.license": provenance.license}),
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
    }
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "linear":
        keys |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float(scaling.factor)}
    return keys | {
        CONTEXT_LENGTH: model.context_length,
        MANIFEST_SHA256: provenance.manifest_sha256,
        RECIPE: json.dumps(provenance.recipe_data, sort_keys=True),
        SOURCE_SHA256: provenance.source_sha256,
        VERSION: provenance.edgellama,
    }


def same_value(actual: Any, expected: Value) -> bool:
    """Returns True for equal values of a key. Floats are equal if their float32 are, as GGUF stores them."""
    if isinstance(expected, float):
        return isinstance(actual, (int, float)) and np.float32(actual) == np.float32(expected)
    if isinstance(expected, list) and expected and isinstance(expected[0], float):
        return isinstance(actual, list) and np.array_equal(_floats32(actual), _floats32(expected))
    return type(actual) is type(expected) and actual == expected


def _floats32(values: list[Any]) -> np.ndarray:
    return np.array(values, np.float32)


def key_problems(actual: Mapping[str, Any], expected: Mapping[str, Value]) -> list[str]:
    """Words about every key that is missing, different or not expected."""
    problems = []
    for key, value in expected.items():
        if key not in actual:
            problems.append(f"{key} is missing")
        elif not same_value(actual[key], value):
            problems.append(_difference(key, actual[key], value))
    return problems + [f"{key} is not expected" for key in actual if key not in expected]


def _difference(key: str, actual: Any, expected: Value) -> str:
    if isinstance(expected, list) and isinstance(actual, list):
        if len(actual) != len(expected):
            return f"{key} has {len(actual)} entries, expected {len(expected)}"
        index = next(i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b)
        return f"{key}: entry {index} is {actual[index]!r:.40}, expected {expected[index]!r:.40}"
    return f"{key} is {actual!r:.40}, expected {expected!r:.40}"


def scale_halves(scales: Tensor, columns: int, block: int) -> tuple[np.ndarray, bool]:
    """(scales float16 [rows, columns / block], True if float16 holds each of them exactly)."""
    halves = scales.to(torch.float16)
    exact = torch.equal(halves.float(), scales.float()) and bool(torch.isfinite(halves).all())
    repeats = math.ceil(columns / block) // scales.shape[1]
    return halves.numpy().repeat(repeats, axis=1), exact
