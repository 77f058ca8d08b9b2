"""Files beside the weights: config.json, generation_config.json and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping

from edgellama.files import to_json
from edgellama.model.llama import Llama
from edgellama.targets.mlx.interface import CONFIG_FILE, GENERATION_FILE, config_data, generation_data
from edgellama.targets.provenance import Provenance


def client_files(
    tokenizer_files: Mapping[str, bytes], model: Llama, provenance: Provenance
) -> dict[str, bytes]:
    """Files that MLX reads beside the weights, by name. The tokenizer is the bundle's own."""
    original = json.loads(tokenizer_files.get(GENERATION_FILE, b"{}"))
    return {
        **tokenizer_files,
        CONFIG_FILE: to_json(config_data(model.config, provenance.recipe)).encode(),
        GENERATION_FILE: to_json(generation_data(model.config, original)).encode(),
    }
