"""Reader of Hugging Face model directories. Weights are safetensors, mapped and read one by one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgellama.checkpoints.checkpoint import Checkpoint, TensorInfo
from edgellama.errors import CheckpointError
from edgellama.model.config import NEUTRAL, LlamaConfig, end_ids
from edgellama.text.stop_tokens import find_stop_tokens, stop_notes
from edgellama.text.tokenizer import Tokenizer

BYTES_PER_WEIGHT = {"F32": 4, "F16": 2, "BF16": 2}

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
    *("transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache"),
}

# RoPE frequencies, which old versions of transformers saved with the weights. They follow from the config.
_ROTARY_BUFFER = re.compile(r"(^|\.)rotary_emb\.inv_freq$")

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_AGAIN = "Download the file again and compare its size with the original's."
_CONVERT = (
    "Convert them to safetensors: load the model in transformers and save it with save_pretrained(directory)."
)


@dataclass(frozen=True)
class _Stored:
    """Location of one tensor: the file, the tensor's name in it, and the entry of the file's header."""

    file: Path
    name: str
    info: TensorInfo

    def read(self) -> Tensor:
        """The tensor as a view of the mapped file. Pages are read on first access.

        The file is mapped anew for each tensor, so that its pages leave memory together with the tensor.
        """
        try:
            return _open(self.file).get_tensor(self.name)  # type: ignore[no-any-return]
        except (SafetensorError, RuntimeError, OSError) as error:
            raise CheckpointError(f"{self.file}: cannot read {self.name}: {error}", remedy=_AGAIN) from error


def open_hf(path: Path) -> Checkpoint:
    """Opens directory `path`: config.json, model.safetensors or its shards, and the tokenizer's files.

    Raises CheckpointError if a part is damaged, missing, quantized or not the plain Llama. Raises
    TokenizerError for the tokenizer.
    """
    data = _json(path / "config.json")
    generation_file = path / "generation_config.json"
    generation = _json(generation_file) if generation_file.exists() else {}
    config = LlamaConfig.from_hf(data, generation)
    files, file_by_tensor = _weight_files(path)
    stored = _tensors(files)
    for name, file in file_by_tensor.items():
        if name not in stored or stored[name].file != file:
            raise CheckpointError(
                f"{path / _INDEX}: {name} is not in {file.name}, where it should be", remedy=_AGAIN
            )
    stored = _with_prefix(path, config, stored)
    notes = _unknown_keys(data)
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
        files=files,
        license=_license(path / "README.md"),
        notes=(*notes, *stop_notes(stops, tokenizer, asked=2)),
        stop_tokens=stops,
    )


def _stop_strings(generation: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Ids of generation_config.json's `stop_strings` that are one token each."""
    texts = generation.get("stop_strings")
    texts = [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else []
    ids = (tokenizer.token_id(text) for text in texts if isinstance(text, str))
    return [token for token in ids if token is not None]


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError for any other content."""
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}", remedy=_AGAIN) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{file}: holds a JSON {type(data).__name__}, expected an object", remedy=_AGAIN
        )
    return data


def _weight_files(path: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """(safetensors files, file of every tensor in the index). The second is empty without an index."""
    single, index = path / _WEIGHTS, path / _INDEX
    if not index.exists():
        if single.exists():
            return (single,), {}
        raise _no_weights(path)
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: no weight_map that says which file holds which tensor", remedy=_AGAIN
        )
    for file in weight_map.values():
        # A path could leave the directory. A link under a plain name may leave it, for Hugging Face's cache.
        if not _is_file_name(file):
            raise CheckpointError(
                f"{index}: {file!r:.80} is not the name of a file in this directory",
                remedy="Shards lie beside their index; correct weight_map.",
            )
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:4])}",
            remedy=f"Download the files that {_INDEX} names into the same directory.",
        )
    if single.exists() and _WEIGHTS not in names:
        raise CheckpointError(
            f"{path}: holds {_WEIGHTS} and also {_INDEX} with other files",
            remedy="One of them is left over from another download or save; remove it.",
        )
    file_by_tensor = {
        name: path / file for name, file in weight_map.items() if not _ROTARY_BUFFER.search(name)
    }
    return tuple(path / name for name in names), file_by_tensor


def _is_file_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(c in name for c in "/\\\0")
        and len(name.encode("utf-8", "surrogatepass")) <= 255
    )


def _no_weights(path: Path) -> CheckpointError:
    others = sorted(f.name for f in path.glob("*.safetensors"))
    pickles = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in path.glob(pattern))
    if any(name.startswith("adapter_model.") for name in (*others, *pickles)):
        return CheckpointError(
            f"{path}: holds an adapter (LoRA) and not a whole model",
            remedy="Merge it into its base model first (peft: merge_and_unload, then save_pretrained).",
        )
    if others:
        return CheckpointError(
            f"{path}: no {_WEIGHTS} and no {_INDEX}, only {', '.join(others[:4])}",
            remedy=f"Download {_INDEX}, or rename the file that is the whole model to {_WEIGHTS}.",
        )
    if pickles:
        return CheckpointError(
            f"{path}: the weights are pickles ({', '.join(pickles[:4])}), which can run code when they are loaded; "
            "expected safetensors",
            remedy=_CONVERT,
        )
    return CheckpointError(
        f"{path}: no weights: neither {_WEIGHTS} nor {_INDEX}",
        remedy="Download the weights into the same directory as config.json.",
    )


def _tensors(files: tuple[Path, ...]) -> dict[str, _Stored]:
    """All tensors of the files by name. Reads headers only."""
    stored: dict[str, _Stored] = {}
    for file in files:
        handle = _open(file)
        for name in handle.keys():  # noqa: SIM118 (a handle, not a mapping)
            if _ROTARY_BUFFER.search(name):
                continue
            if name in stored:
                raise CheckpointError(
                    f"{file}: {name} is also in {stored[name].file.name}",
                    remedy="Remove the file that is left over.",
                )
            view = handle.get_slice(name)
            dtype, shape = view.get_dtype(), tuple(view.get_shape())
            if dtype not in BYTES_PER_WEIGHT:
                raise CheckpointError(
                    f"{file}: {name} has dtype {dtype}, expected F32, F16 or BF16",
                    remedy="If this checkpoint is quantized, give the full-precision one; else convert it to F32.",
                )
            info = TensorInfo(dtype, shape, BYTES_PER_WEIGHT[dtype] * math.prod(shape))
            stored[name] = _Stored(file, name, info)
    return stored


def _open(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            if stream.read(23) == b"version https://git-lfs":
                raise CheckpointError(
                    f"{file}: a Git LFS pointer and not the weights", remedy="Run `git lfs pull`."
                )
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file}: damaged or not safetensors: {error}", remedy=_AGAIN) from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened: {error}", remedy="Check the file.") from error


def _with_prefix(path: Path, config: LlamaConfig, stored: dict[str, _Stored]) -> dict[str, _Stored]:
    """Adds LlamaForCausalLM's prefix `model.` to names saved from LlamaModel, which has no lm_head."""
    if "embed_tokens.weight" not in stored or any(name.startswith(("model.", "lm_head.")) for name in stored):
        return stored
    if not config.tie_word_embeddings:
        raise CheckpointError(
            f"{path}: the weights are those of LlamaModel, without lm_head, and tie_word_embeddings is false",
            remedy="Give the checkpoint saved from LlamaForCausalLM.",
        )
    return {f"model.{name}": entry for name, entry in stored.items()}


def _check_tied(embedding: _Stored, head: _Stored) -> None:
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


def _license(readme: Path) -> str | None:
    """License in the front matter of a model card, or None."""
    if not readme.is_file():
        return None
    front_matter = re.match(
        r"\s*---\s*\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL
    )
    licenses = (
        dict(re.findall(r"^(license|license_name):[ \t]*[\"']?([^\s\"'#]+)", front_matter[1], re.MULTILINE))
        if front_matter
        else {}
    )
    name: str | None = licenses.get("license")
    return licenses.get("license_name", name) if name == "other" else name
