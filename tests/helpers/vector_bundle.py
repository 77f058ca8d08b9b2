"""Manifest of the bundle in tests/vectors, without the hashes of its files."""

from __future__ import annotations

from typing import Any

from edgellama.checkpoints import open_checkpoint
from edgellama.text.chat import ChatTemplate, derive_format
from edgellama.text.tokenizer import Tokenizer
from tests.helpers.paths import TINY

# A copy, so that the vectors do not change with the recipes.
RECIPE: dict[str, Any] = {
    "name": "int4-fast",
    "summary": "int4 in groups of 32",
    "algorithm": "round",
    "max_kl": 0.1,
    "max_kl_small": 0.45,
    "rules": [{"modules": "*", "scheme": {"bits": 4, "group_size": 32, "int8_activations": True}}],
}


def manifest(tokenizer: Tokenizer) -> dict[str, Any]:
    """Sections of the manifest for `write_manifest`. The chat format is derived from the tokenizer's template."""
    config = open_checkpoint(TINY).config
    assert tokenizer.chat_template is not None
    template = ChatTemplate(
        tokenizer.chat_template, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
    )
    chat_format, _ = derive_format(template)
    assert chat_format is not None
    entry = {
        "target": "xnnpack",
        "path": "xnnpack/model.pte",
        "bytes": 51,
        "inputs": [
            {"name": "tokens", "dtype": "int64", "shape": [1, "T"], "range": [1, 64]},
            {"name": "input_pos", "dtype": "int64", "shape": [1]},
        ],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [1, config.vocab_size]}],
        "states": [],
        "methods": {"forward": None, "get_vocab_size": config.vocab_size},
        "requires": {
            "runtime": "executorch",
            "min_version": "1.4.0",
            "backends": ["XnnpackBackend"],
            "operators": [],
            "min_os": {"android": "API 23", "ios": "17"},
        },
        "quantization": [
            {
                "scheme": "int4",
                "bits": 4,
                "group_size": 32,
                "activations": "int8",
                "tensors": 28,
                "bytes": 420000,
            }
        ],
        "memory": {"weights": 570884, "kv_cache": 131072, "peak_estimate": 1000000},
    }
    return {
        "name": "vectors",
        "tools": {"edgellama": "0", "torch": "0"},
        "source": {
            "format": "safetensors",
            "architecture": "llama",
            "parameters": config.parameters,
            "sha256": "0" * 64,
            "license": None,
        },
        "model": {**config.to_dict(), "context_length": 64},
        "chat": {
            "template": "tokenizer/chat_template.jinja",
            "format": chat_format.to_dict(),
            "reason": None,
        },
        "recipe": RECIPE,
        "artifacts": [entry],
        "accuracy": {},
    }
