"""Interface of edgellama's MLX directories: file names, keys of the header, and `config.json`.

The export writes it; the runtime, the gate and apps read it. The layout is that of `mlx_lm.convert`, so that
mlx-lm and mlx-swift-lm take the directory as it is.

A quantized weight is three tensors: `weight` uint32 [rows, columns * bits / 32] with the first code in the
lowest bits, `scales` and `biases` [rows, columns / group size]. A weight is `scales * code + biases`, codes
counted from 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import Recipe, Scheme
from edgellama.targets.mlx.rope import rope_scaling
from edgellama.targets.mlx.storage import ROW_GROUP

if TYPE_CHECKING:
    from edgellama.model.config import LlamaConfig
    from edgellama.model.llama import Llama
    from edgellama.targets.provenance import Provenance

WEIGHTS_FILE, CONFIG_FILE, GENERATION_FILE = "model.safetensors", "config.json", "generation_config.json"

# Keys of the metadata in the header of the weights.
FORMAT = "format"  # "mlx", as in files of mlx-lm
VOCAB_SIZE = "edgellama.vocab_size"
CONTEXT_LENGTH = "edgellama.context_length"
SOURCE_SHA256 = "edgellama.source_sha256"
MANIFEST_SHA256 = "edgellama.manifest_sha256"
RECIPE = "edgellama.recipe"
VERSION = "edgellama.version"

DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
GROUP_SIZES = (32, 64, 128)  # of MLX's affine quantization
DEFAULT_LAYOUT = (64, 4)  # of a model without integer weights; nothing reads it


def metadata(model: Llama, provenance: Provenance) -> dict[str, str]:
    """Every key of the header's metadata, as the export writes it and the gate expects it."""
    return {
        FORMAT: "mlx",
        CONTEXT_LENGTH: str(model.context_length),
        MANIFEST_SHA256: provenance.manifest_sha256,
        RECIPE: json.dumps(provenance.recipe_data, sort_keys=True),
        SOURCE_SHA256: provenance.source_sha256,
        VERSION: provenance.edgellama,
        VOCAB_SIZE: str(model.config.vocab_size),
    }


def group_size(scheme: Scheme, columns: int) -> int:
    """Number of weights that share a scale in the file.

    MLX has no scale per row, so it is repeated for groups of 64, or of 32 in rows that 64 does not divide.
    """
    return scheme.group_size or (ROW_GROUP if columns % ROW_GROUP == 0 else GROUP_SIZES[0])


def has_lm_head(config: LlamaConfig, recipe: Recipe) -> bool:
    """True if the file has a lm_head of its own.

    A tied table is stored once if both of its uses have the same integers.
    """
    if not config.tie_word_embeddings:
        return True
    schemes = _schemes(config, recipe)
    table, head = (_stored_form(schemes[name]) for name in ("model.embed_tokens", "lm_head"))
    return table != head


def layouts(config: LlamaConfig, recipe: Recipe) -> dict[str, tuple[int, int] | None]:
    """(group size, bits) of every linear and the embedding in the file, by name; None for floats."""
    shapes = module_shapes(config.tensor_shapes(), config.tie_word_embeddings)
    return {
        name: None if scheme is None else (group_size(scheme, shapes[name][1]), scheme.bits)
        for name, scheme in _schemes(config, recipe).items()
        if name != "lm_head" or has_lm_head(config, recipe)
    }


def config_data(config: LlamaConfig, recipe: Recipe) -> dict[str, Any]:
    """`config.json` as data.

    `quantization` has the most common group size and bits, and an entry for every module with others. Older
    readers take `quantization_config`, which is equal.
    """
    data: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": config.attention_bias,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": config.mlp_bias,
        "model_type": "llama",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": rope_scaling(config),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": not has_lm_head(config, recipe),
        "torch_dtype": recipe.mlx_dtype,
        "vocab_size": config.vocab_size,
        **_end_ids(config),
    }
    quantization = _quantization(layouts(config, recipe))
    if quantization:
        data |= {"quantization": quantization, "quantization_config": quantization}
    return data


def generation_data(config: LlamaConfig, original: Mapping[str, Any]) -> dict[str, Any]:
    """`generation_config.json` as data: the checkpoint's own, with the ids that end an answer."""
    return {**original, **_end_ids(config)}


def _end_ids(config: LlamaConfig) -> dict[str, Any]:
    """Every id that ends an answer. Without one, MLX takes the tokenizer's own."""
    ids: dict[str, Any] = {} if config.bos_token_id is None else {"bos_token_id": config.bos_token_id}
    return ids | ({"eos_token_id": list(config.eos_token_ids)} if config.eos_token_ids else {})


def _quantization(by_module: Mapping[str, tuple[int, int] | None]) -> dict[str, Any]:
    used = [layout for layout in by_module.values() if layout is not None]
    if not used:
        return {}
    # The first of equally common ones, so that equal models give equal bytes.
    common = max(dict.fromkeys(used), key=used.count)
    others = {
        name: {"group_size": layout[0], "bits": layout[1]}
        for name, layout in by_module.items()
        if layout is not None and layout != common
    }
    return {"group_size": common[0], "bits": common[1], **others}


def _schemes(config: LlamaConfig, recipe: Recipe) -> dict[str, Scheme | None]:
    return check_recipe(recipe, module_shapes(config.tensor_shapes(), config.tie_word_embeddings))


def _stored_form(scheme: Scheme | None) -> tuple[int, int | None] | None:
    return None if scheme is None else (scheme.bits, scheme.group_size)
