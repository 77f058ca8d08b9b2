"""Reader of Hugging Face model directories: config, tokenizer, and what the weight files hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from edgellama.checkpoints.checkpoint import Checkpoint
from edgellama.checkpoints.given.huggingface import quantized_modules
from edgellama.checkpoints.given.settings import read_settings
from edgellama.checkpoints.given.weights import Given
from edgellama.checkpoints.hf_weights import (
    AGAIN,
    BYTES_PER_WEIGHT,
    PACKED,
    Stored,
    WeightFiles,
    planned_tensors,
    read_object,
    stored_tensors,
    weight_files,
)
from edgellama.checkpoints.labels import trained_labels
from edgellama.checkpoints.licenses import card_license
from edgellama.errors import CheckpointError
from edgellama.model.config import NEUTRAL, LlamaConfig, end_ids
from edgellama.model.llama import inverse_frequencies
from edgellama.text.stop_tokens import find_stop_tokens, stop_notes
from edgellama.text.tokenizer import Tokenizer

# Keys of config.json and of its rope_scaling that LlamaConfig.from_hf reads, besides those of NEUTRAL.
USED = {
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "layer_types"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id"),
}
ROPE_USED = {
    *("rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"),
    *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# Keys of config.json that do not affect the logits: training, sampling, bookkeeping, other runtimes.
HARMLESS = {
    *("_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_name_or_path"),
    *("attention_dropout", "attn_implementation", "bad_words_ids", "chunk_size_feed_forward", "do_sample"),
    *("dtype", "finetuning_task", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder"),
    *("is_llama_config", "label2id", "max_length", "max_sequence_length", "min_length", "output_attentions"),
    *("output_hidden_states", "pad_token", "pad_token_id", "pretraining_tp", "problem_type", "return_dict"),
    *("temperature", "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config"),
    *(
        "compression_config",
        "quantization_config",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    ),
}


def open_hf(path: Path, *, weights: bool = True) -> Checkpoint:
    """Opens directory `path`: config.json, model.safetensors or its shards, and the tokenizer's files.

    weights: False for a directory without them. The tensors follow from the config, and none can be read.

    Raises CheckpointError if a part is damaged, missing, quantized or not the plain Llama. Raises
    TokenizerError for the tokenizer.
    """
    data = read_object(path / "config.json")
    generation_file = path / "generation_config.json"
    generation = read_object(generation_file) if generation_file.exists() else {}
    config = LlamaConfig.from_hf(data, generation)
    found = weight_files(path) if weights else WeightFiles(())
    stored, buffers, stored_notes = (
        stored_tensors(found.files, packed=_settings_key(data) is not None)
        if weights
        else planned_tensors(path, config, data)
    )
    notes = (*_unknown_keys(data), *found.notes, *stored_notes, *_frequencies_differ(buffers, config))
    for name, file in found.index.items():
        if name == "lm_head.weight" and config.tie_word_embeddings and name not in stored:
            notes += ("the index lists lm_head.weight, which is tied to the embedding and not stored",)
        elif name not in stored or stored[name].file != file:
            raise CheckpointError(
                f"{path / found.index_name}: {name} is not in {file.name}, where it should be", remedy=AGAIN
            )
    if config.is_classifier and "score.weight" in stored:
        stored["lm_head.weight"] = stored.pop("score.weight")
    stored = _with_prefix(path, config, stored)
    given, stored, quantization_notes = _given_codes(path, data, config, stored)
    notes += quantization_notes
    if (
        config.tie_word_embeddings
        and "model.embed_tokens.weight" not in stored
        and "lm_head.weight" in stored
    ):
        stored["model.embed_tokens.weight"] = stored.pop("lm_head.weight")
        notes += ("only lm_head.weight is stored of the tied pair: it is the embedding too",)
    if config.tie_word_embeddings and {"model.embed_tokens.weight", "lm_head.weight"} <= stored.keys():
        _check_tied(stored["model.embed_tokens.weight"], stored.pop("lm_head.weight"))
        notes += (
            "lm_head.weight is stored although it is tied to the embedding; the two are equal, one is used",
        )
    tokenizer = Tokenizer.from_directory(path)
    stops = find_stop_tokens(
        {
            "config.json": end_ids(data, "config.json"),
            "generation_config.json": [
                *end_ids(generation, "generation_config.json"),
                *_stop_strings(generation, tokenizer),
            ],
        },
        tokenizer,
    )
    return Checkpoint(
        path=path,
        format="safetensors",
        config=replace(config, eos_token_ids=tuple(stop.id for stop in stops)),
        infos={name: entry.info for name, entry in stored.items()},
        read=lambda name: stored[name].read(),
        tokenizer=tokenizer,
        files=found.files,
        license=card_license(path / "README.md"),
        notes=(*notes, *stop_notes(stops, tokenizer, asked=2)),
        stop_tokens=stops,
        given=given,
        classifier=None if config.label_rows is None else trained_labels(data, config.label_rows),
    )


def _settings_key(data: Mapping[str, Any]) -> str | None:
    keys = (key for key in ("quantization_config", "compression_config") if data.get(key) is not None)
    return next(keys, None)


def _given_codes(
    path: Path, data: Mapping[str, Any], config: LlamaConfig, stored: dict[str, Stored]
) -> tuple[Given | None, dict[str, Stored], tuple[str, ...]]:
    """(codes of a quantized checkpoint, tensors of the plain model, notes).

    A quantization_config beside weights of full precision is what a training leaves behind: the weights decide.

    Raises CheckpointError for quantized weights that are not taken as codes.
    """
    key = _settings_key(data)
    if key is None:
        return None, stored, ()
    settings, expected = data[key], config.tensor_shapes()
    plain = all(entry.info.dtype in BYTES_PER_WEIGHT for entry in stored.values())
    if plain and all(expected.get(name) == entry.info.shape for name, entry in stored.items()):
        method = settings.get("quant_method", "unnamed") if isinstance(settings, Mapping) else settings
        return (
            None,
            stored,
            (f"config.json: {key} ({method!r:.40}) is ignored: the weights are of full precision",),
        )
    found = quantized_modules(path, read_settings(path, settings), expected, stored)
    odd = [name for name, entry in found.stored.items() if entry.info.dtype in PACKED]
    if odd:
        raise CheckpointError(
            f"{path}: {odd[0]} has dtype {found.stored[odd[0]].info.dtype}, and is no part of a module's codes",
            remedy="Give the full-precision checkpoint: edgellama quantizes it itself.",
        )
    note = (
        f"The weights are codes already, {found.given.describe()}: `-r as-is` takes them as they are. Quality is "
        "measured against their dequantized values."
    )
    return found.given, dict(found.stored), (note, *found.notes)


def _frequencies_differ(buffers: Sequence[Stored], config: LlamaConfig) -> tuple[str, ...]:
    """A note if stored RoPE frequencies are not those of the config, which count."""
    expected = inverse_frequencies(config)
    for entry in buffers:
        if entry.info.shape == tuple(expected.shape):
            if not torch.allclose(entry.read().float(), expected, rtol=0.02, atol=1e-6):
                return (
                    "the stored RoPE frequencies (rotary_emb.inv_freq) are not those of config.json, which counts",
                )
            break
    return ()


def _stop_strings(generation: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Ids of generation_config.json's `stop_strings` that are one token each."""
    texts = generation.get("stop_strings")
    texts = [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else []
    ids = (tokenizer.token_id(text) for text in texts if isinstance(text, str))
    return [token for token in ids if token is not None]


def _with_prefix(path: Path, config: LlamaConfig, stored: dict[str, Stored]) -> dict[str, Stored]:
    """Adds LlamaForCausalLM's prefix `model.` to names saved from LlamaModel, which has no lm_head."""
    if "embed_tokens.weight" not in stored or any(name.startswith(("model.", "lm_head.")) for name in stored):
        return stored
    if not config.tie_word_embeddings:
        raise CheckpointError(
            f"{path}: the weights are those of LlamaModel, without lm_head, and tie_word_embeddings is false",
            remedy="Give the checkpoint saved from LlamaForCausalLM.",
        )
    return {f"model.{name}": entry for name, entry in stored.items()}


def _check_tied(embedding: Stored, head: Stored) -> None:
    """Raises CheckpointError unless a stored lm_head equals its embedding bit for bit.

    transformers 4 ignores a different lm_head; transformers 5 uses it untied.
    """
    embedding_values, head_values = embedding.read().flatten(), head.read().flatten()
    if embedding.info != head.info or not torch.equal(
        embedding_values.view(torch.uint8), head_values.view(torch.uint8)
    ):
        raise CheckpointError(
            f"{head.file}: lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings is true",
            remedy="If the model was trained untied, set tie_word_embeddings to false; else remove lm_head.weight.",
        )


def _unknown_keys(data: Mapping[str, Any]) -> tuple[str, ...]:
    """A note with the keys of config.json that are neither used nor harmless; empty without such keys."""
    unknown = sorted(data.keys() - USED - HARMLESS - NEUTRAL.keys())
    for place in ("rope_scaling", "rope_parameters"):
        unknown += [f"{place}.{key}" for key in sorted((data.get(place) or {}).keys() - ROPE_USED)]
    return (
        (f"config.json: ignored keys that edgellama does not know: {', '.join(unknown)}",) if unknown else ()
    )
