"""RoPE scaling in the words of config.json, as MLX reads it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from edgellama.errors import RecipeError
from edgellama.model.config import LlamaConfig, RopeScaling
from edgellama.model.llama import inverse_frequencies

# Of all published Llama 3.1 to 3.3 models. A GGUF file stores only the factors that follow from them.
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192
_SAME = 1e-5  # relative; float32 factors of one formula differ by 1e-7


def rope_scaling(config: LlamaConfig) -> dict[str, Any] | None:
    """`rope_scaling` of config.json. Raises RecipeError for factors that MLX has no formula for."""
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if scaling.rope_type == "frequency_factors":
        scaling = _formula(config, scaling)
    if scaling.rope_type == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _formula(config: LlamaConfig, scaling: RopeScaling) -> RopeScaling:
    """The formula whose factors a GGUF file holds."""
    candidate = RopeScaling("llama3", max(scaling.factors), _LOW, _HIGH, _ORIGINAL)
    wanted = inverse_frequencies(config)
    if torch.allclose(_frequencies(config, candidate), wanted, rtol=_SAME, atol=0):
        return candidate
    raise RecipeError(
        "target 'mlx': this checkpoint has RoPE factors of its own (rope_freqs.weight), and MLX's Llama has only the "
        "formulas `linear` and `llama3`",
        remedy="Export the model's original Hugging Face directory, or leave out target mlx.",
    )


def _frequencies(config: LlamaConfig, scaling: RopeScaling) -> torch.Tensor:
    return inverse_frequencies(replace(config, rope_scaling=scaling))
