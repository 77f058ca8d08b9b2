"""A small bundle with a tokenizer, a report, and noise in place of the artifact."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import write_manifest
from edgellama.recipe import RECIPES
from tests.helpers.paths import TINY

ARTIFACT, TOKENIZER, REPORT = "xnnpack/model.pte", "tokenizer/tokenizer.json", "reports/export.json"
SECTIONS: dict[str, Any] = {
    "name": "small",
    "tools": {"edgellama": "0.1.0", "torch": "2.13.0"},
    "source": {
        "format": "safetensors",
        "architecture": "llama",
        "parameters": 1000,
        "sha256": "0" * 64,
        "license": None,
    },
    "model": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_ids": [2, 0],
        "context_length": 128,
    },
    "chat": {"template": None, "format": None, "reason": "the checkpoint has no chat template"},
    "recipe": RECIPES["int4-fast"].to_dict(),
    "artifacts": [
        {
            "target": "xnnpack",
            "path": ARTIFACT,
            "bytes": 4096,
            "inputs": [{"name": "tokens", "dtype": "int64", "shape": [1, "T"], "range": [1, 128]}],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": [1, 512]}],
            "states": [],
            "methods": {"forward": None, "get_eos_ids": [2, 0]},
            "requires": {
                "runtime": "executorch",
                "min_version": "1.4.0",
                "backends": ["XnnpackBackend"],
                "operators": [],
                "min_os": {"android": "API 23"},
            },
            "quantization": [
                {
                    "scheme": "int4",
                    "bits": 4,
                    "group_size": 32,
                    "activations": "int8",
                    "tensors": 1,
                    "bytes": 99,
                }
            ],
            "memory": {"weights": 100, "kv_cache": 200, "peak_estimate": 400},
        }
    ],
    "accuracy": {},
}


def write_small_bundle(directory: Path) -> Bundle:
    """Writes the bundle into an empty directory. Its artifact is noise, all other parts are sound."""
    for name in (ARTIFACT, TOKENIZER, REPORT):
        (directory / name).parent.mkdir()
    (directory / ARTIFACT).write_bytes(bytes(range(256)) * 16)
    shutil.copy(TINY / "tokenizer.json", directory / TOKENIZER)
    (directory / REPORT).write_text("{}")
    return write_manifest(directory, SECTIONS)
