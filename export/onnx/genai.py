"""genai_config.json and the tokenizer beside the model: a directory that onnxruntime-genai loads as is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellama.files import to_json
from edgellama.formats.onnx_model import MODEL_FILE
from edgellama.model.llama import Llama
from edgellama.recipe import Recipe
from edgellama.targets.onnx.interface import (
    ATTENTION_MASK,
    GENAI_FILE,
    INPUT_IDS,
    LOGITS,
    PAST_KEY,
    PAST_VALUE,
    PRESENT_KEY,
    PRESENT_VALUE,
    session_entries,
)
from edgellama.targets.provenance import Provenance


def client_files(
    tokenizer_files: Mapping[str, bytes], model: Llama, provenance: Provenance
) -> dict[str, bytes]:
    """onnxruntime-genai's files beside the model, by name. The tokenizer is the bundle's own."""
    data = genai_config(model, provenance.recipe)
    return {GENAI_FILE: to_json(data).encode(), **tokenizer_files}


def genai_config(model: Llama, recipe: Recipe) -> dict[str, Any]:
    """The configuration as data.

    Greedy unless the app asks for sampling. Every eos id of the checkpoint stops.
    """
    config, layer = model.config, "%d"
    eos = list(config.eos_token_ids)
    options: dict[str, Any] = {
        "log_id": "onnxruntime-genai",
        "provider_options": [],
        **session_entries(recipe),
    }
    ids: dict[str, Any] = {"eos_token_id": eos}
    if config.bos_token_id is not None:
        ids["bos_token_id"] = config.bos_token_id
    if eos:
        ids["pad_token_id"] = eos[0]
    return {
        "model": {
            "type": "llama",
            **ids,
            "context_length": model.context_length,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": options,
                "filename": MODEL_FILE,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "inputs": {
                    "input_ids": INPUT_IDS,
                    "attention_mask": ATTENTION_MASK,
                    "past_key_names": PAST_KEY.format(layer),
                    "past_value_names": PAST_VALUE.format(layer),
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": PRESENT_KEY.format(layer),
                    "present_value_names": PRESENT_VALUE.format(layer),
                },
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": config.num_key_value_heads,
            },
        },
        "search": {
            "do_sample": False,
            "max_length": model.context_length,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": recipe.onnx_form == "ort",
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }
