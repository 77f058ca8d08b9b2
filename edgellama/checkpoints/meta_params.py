"""LlamaConfig from Meta's params.json, completed from tables of the released models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellama.errors import CheckpointError
from edgellama.model.config import LlamaConfig, RopeScaling
from edgellama.text.tokenizer import Tokenizer

# Keys allowed in params.json. Any other key may change the computation.
PARAMS = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier"),
    *("norm_eps", "rope_theta", "use_scaled_rope", "rope_scale_factor", "max_seq_len", "max_batch_size"),
}

# (dim, n_layers) -> rope_scale_factor of released models with use_scaled_rope. Their params.json lacks it.
ROPE_SCALE_FACTORS = {
    (2048, 16): 32.0,  # Llama 3.2 1B
    (3072, 28): 32.0,  # Llama 3.2 3B
    (4096, 32): 8.0,  # Llama 3.1 8B
    (8192, 80): 8.0,  # Llama 3.1 and 3.3 70B
    (16384, 126): 8.0,  # Llama 3.1 405B
}

# (vocab_size, rope_theta, norm_eps) -> context length of released models. Their params.json lacks it too.
CONTEXT_LENGTHS = {
    (32000, 1e4, 1e-6): 2048,  # Llama
    (32000, 1e4, 1e-5): 4096,  # Llama 2
    (32000, 1e6, 1e-5): 16384,  # Code Llama
    (32016, 1e6, 1e-5): 16384,  # Code Llama with infilling
    (128256, 5e5, 1e-5): 8192,  # Llama 3
}
SCALED_CONTEXT_LENGTH = 131072  # Llama 3.1 and later
_LARGEST = 1e18  # number; products of larger ones may be infinite

# End tokens of released models. Instruct models end a turn with <|eot_id|>, or a tool call with <|eom_id|>.
LLAMA3_STOP = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def read_params(file: Path) -> dict[str, Any]:
    """The object in params.json.

    Raises CheckpointError for an unreadable file and for keys that may change the computation.
    """
    try:
        params = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: not readable as JSON: {error}", remedy="Download it again from where the weights came."
        ) from error
    if not isinstance(params, dict):
        raise CheckpointError(
            f"{file}: expected an object, found {type(params).__name__}",
            remedy="Download it again from where the weights came.",
        )
    unknown = sorted(key for key in params.keys() - PARAMS if params[key] not in (None, False))
    if unknown:
        raise CheckpointError(
            f"{file}: {', '.join(unknown)}: not a key of the plain Llama, which may change the computation",
            remedy="Give a full-precision checkpoint of Llama 2 or 3 (text only, no experts, not quantized).",
        )
    return params


def meta_config(params: Mapping[str, Any], tokenizer: Tokenizer, *, rows: int, tied: bool) -> LlamaConfig:
    """LlamaConfig of params.json, with the defaults of Meta's model code.

    rows: Rows of the embedding, used as the vocabulary size if vocab_size is -1 or absent.
    Raises CheckpointError for invalid values.
    """
    dim, layers, heads = (
        positive_int(params, "dim"),
        positive_int(params, "n_layers"),
        positive_int(params, "n_heads"),
    )
    if dim % heads:
        raise _bad(f"dim ({dim}) is not a multiple of n_heads ({heads})")
    vocab_size = rows if params.get("vocab_size", -1) == -1 else positive_int(params, "vocab_size")
    theta, eps = _number(params, "rope_theta", 1e4), _number(params, "norm_eps", 1e-5)
    scaled = params.get("use_scaled_rope") or False
    if not isinstance(scaled, bool):
        raise _bad(f"use_scaled_rope must be true or false, got {scaled!r}")
    scaling = RopeScaling("llama3", factor=_scale_factor(params, dim, layers)) if scaled else None
    stops = [tokenizer.token_id(token) for token in (*LLAMA3_STOP, tokenizer.eos_token) if token is not None]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=_feed_forward_size(params, dim),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=positive_int(params, "n_kv_heads", heads),
        head_dim=dim // heads,
        max_position_embeddings=_context_length(params, vocab_size, theta, eps, scaled=scaled),
        rms_norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
        bos_token_id=None if tokenizer.bos_token is None else tokenizer.token_id(tokenizer.bos_token),
        eos_token_ids=tuple(dict.fromkeys(token for token in stops if token is not None)),
    )


def _feed_forward_size(params: Mapping[str, Any], dim: int) -> int:
    """Meta's FeedForward: 2/3 of 4 * dim, times ffn_dim_multiplier, rounded up to multiple_of."""
    size = int(2 * 4 * dim / 3)
    if params.get("ffn_dim_multiplier") is not None:
        size = int(_number(params, "ffn_dim_multiplier", 1.0) * size)
    multiple = positive_int(params, "multiple_of", 256)
    return multiple * ((size + multiple - 1) // multiple)


def _scale_factor(params: Mapping[str, Any], dim: int, layers: int) -> float:
    if params.get("rope_scale_factor") is not None:
        return _number(params, "rope_scale_factor", 1.0)
    if (dim, layers) not in ROPE_SCALE_FACTORS:
        raise CheckpointError(
            f"params.json: use_scaled_rope is true, and no released Llama has dim {dim} with {layers} layers, "
            "so the factor is not known",
            remedy='Add "rope_scale_factor" to params.json (8 in Llama 3.1, 32 in Llama 3.2 1B and 3B).',
        )
    return ROPE_SCALE_FACTORS[dim, layers]


def _context_length(
    params: Mapping[str, Any], vocab_size: int, theta: float, eps: float, *, scaled: bool
) -> int:
    if params.get("max_seq_len") is not None:
        return positive_int(params, "max_seq_len")
    if scaled:
        return SCALED_CONTEXT_LENGTH
    if (vocab_size, theta, eps) not in CONTEXT_LENGTHS:
        raise CheckpointError(
            f"params.json does not say the context length, and no released Llama has vocab_size {vocab_size}, "
            f"rope_theta {theta:g} and norm_eps {eps:g}",
            remedy='Add "max_seq_len" to params.json: the number of positions that the model was trained with.',
        )
    return CONTEXT_LENGTHS[vocab_size, theta, eps]


def positive_int(params: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Integer from 1 to 2**31 - 1 under `key`; `default` if absent or null. Raises CheckpointError."""
    value = params.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise _bad(f"{key} must be a positive integer, got {value!r}")
    return value


def _number(params: Mapping[str, Any], key: str, default: float) -> float:
    value = params.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= _LARGEST:
        raise _bad(f"{key} must be a positive number up to {_LARGEST:g}, got {value!r}")
    return float(value)


def _bad(what: str) -> CheckpointError:
    return CheckpointError(f"params.json: {what}", remedy="Check the file against the model's original one.")
