"""Reader of GGUF checkpoints: converts llama.cpp's names, constants and row order to Hugging Face's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from edgellama.checkpoints.checkpoint import Checkpoint, TensorInfo
from edgellama.checkpoints.gguf_tokenizer import rebuild_tokenizer, special_id
from edgellama.checkpoints.given.gguf import given_blocks
from edgellama.checkpoints.given.weights import Given
from edgellama.errors import CheckpointError
from edgellama.formats.gguf import FLOATS, GgufFile, read_gguf
from edgellama.formats.gguf_names import GLOBAL_TENSORS, LAYER_TENSORS, ROPE_FACTORS, is_rotated, unpermute
from edgellama.model.config import LlamaConfig, RopeScaling
from edgellama.text.stop_tokens import TURN_ENDS, find_stop_tokens, stop_notes
from edgellama.text.tokenizer_json import CONTROL

METADATA, NAMES = "the GGUF metadata", "a name that llama.cpp knows"
# Types whose values tests/formats/test_gguf_types.py compares with those of ggml's own library.
QUANTIZED = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")

# Metadata keys under `llama.` that are read below or do not affect the computation.
KNOWN = frozenset(
    {
        "vocab_size",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "block_count",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scale_linear",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
    }
)
# Metadata keys that affect the computation, with their neutral values. Any other key is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}

_OTHER_MODEL = (
    "edgellama exports the plain Llama only; if this model is one, give its Hugging Face directory."
)
_DAMAGED = (
    "Convert the model again with llama.cpp's convert_hf_to_gguf.py, or give its Hugging Face directory."
)


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file of architecture `llama`. Quantized tensors are dequantized when read.

    Raises CheckpointError or TokenizerError, naming the cause, if it is damaged or not the plain Llama.
    """
    file = read_gguf(path)
    _check_architecture(file)
    _check_types(file)
    tokenizer = rebuild_tokenizer(file.metadata)
    names = _hf_names(file)
    config = _config(file, names)
    stops = find_stop_tokens(
        {METADATA: config.eos_token_ids, NAMES: _named_ends(file.metadata)}, tokenizer, ask_tokenizer=False
    )
    config = replace(config, eos_token_ids=tuple(stop.id for stop in stops))
    infos = {}
    for hf_name, name in names.items():
        tensor = file.tensors[name]
        infos[hf_name] = TensorInfo(tensor.dtype, tensor.shape, tensor.nbytes)

    weights = replace(file, metadata={})  # stays open in `read`, so it drops the large vocabulary

    def read(hf_name: str) -> Tensor:
        weight = weights.read(names[hf_name])
        if is_rotated(hf_name):
            return unpermute(weight, config.head_dim)
        return weight

    given = given_blocks(weights, names, config.head_dim)
    return Checkpoint(
        path=path,
        format="gguf",
        config=config,
        infos=infos,
        read=read,
        tokenizer=tokenizer,
        files=file.files,
        license=_license(file),
        notes=(
            *_notes(file, given),
            *stop_notes(stops, tokenizer, 1 + (tokenizer.chat_template is not None)),
        ),
        stop_tokens=stops,
        given=given,
    )


def _named_ends(metadata: Mapping[str, Any]) -> list[int]:
    """The control token whose text llama.cpp takes for a turn's end in a file without `eot_token_id`."""
    if special_id(metadata, "eot") is not None:
        return []
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    controls = {token: i for i, token in enumerate(tokens) if types[i] == CONTROL}
    return [controls[text] for text in TURN_ENDS if text in controls][:1]


def _check_architecture(file: GgufFile) -> None:
    path, metadata = file.path, file.metadata
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{path}: general.type is {kind!r}, expected 'model'", remedy=_OTHER_MODEL)
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{path}: general.architecture is {architecture!r}, expected 'llama'", remedy=_OTHER_MODEL
        )
    version = metadata.get("general.quantization_version", 2)
    if version != 2:
        raise CheckpointError(
            f"{path}: general.quantization_version is {version!r}, expected 2", remedy=_DAMAGED
        )
    for key, value in metadata.items():
        name = key.removeprefix("llama.")
        if name == key or name in KNOWN:
            continue
        if name not in NEUTRAL:
            raise CheckpointError(
                f"{path}: {key} = {value!r:.60} is not a key that edgellama knows: it may change the computation",
                remedy=_OTHER_MODEL,
            )
        if value not in NEUTRAL[name]:
            raise CheckpointError(
                f"{path}: {key} is {value!r:.60}, expected {NEUTRAL[name][0]!r}: this changes the computation in "
                "a way that the plain Llama does not have",
                remedy=_OTHER_MODEL,
            )


def _check_types(file: GgufFile) -> None:
    for name, tensor in file.tensors.items():
        if tensor.dtype not in FLOATS and tensor.dtype not in QUANTIZED:
            raise CheckpointError(
                f"{file.path}: tensor {name} has type {tensor.dtype}, expected one of "
                f"{', '.join((*FLOATS, *QUANTIZED))}",
                remedy="Take another file of the same model, best F16: quantizing twice loses accuracy.",
            )


def _hf_names(file: GgufFile) -> dict[str, str]:
    """GGUF name of every weight, by Hugging Face name. Raises CheckpointError for unknown tensors."""
    names, unknown = {}, []
    for name in file.tensors:
        layer = _LAYER_NAME.fullmatch(name)
        if name in GLOBAL_TENSORS:
            names[GLOBAL_TENSORS[name]] = name
        elif layer and layer[2] in LAYER_TENSORS:
            names[f"model.layers.{int(layer[1])}.{LAYER_TENSORS[layer[2]]}.{layer[3]}"] = name
        elif name != ROPE_FACTORS:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{file.path}: {len(unknown)} tensors that a plain Llama does not have: {', '.join(unknown[:4])}",
            remedy=_OTHER_MODEL,
        )
    return names


def _config(file: GgufFile, names: Mapping[str, str]) -> LlamaConfig:
    hidden, heads = _count(file, "embedding_length"), _count(file, "attention.head_count")
    head_dim = _count(file, "attention.key_length", hidden // heads)
    # llama.cpp's default for the length of values is embedding_length / head_count.
    for key, default in (("attention.value_length", hidden // heads), ("rope.dimension_count", head_dim)):
        actual_size = _count(file, key, default)
        if actual_size != head_dim:
            raise CheckpointError(
                f"{file.path}: llama.{key} is {actual_size}, expected the head size {head_dim}",
                remedy=_OTHER_MODEL,
            )
    layers = _count(file, "block_count")
    stored_layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    if layers != len(stored_layers):
        raise CheckpointError(
            f"{file.path}: llama.block_count is {layers}, and there are tensors of {len(stored_layers)} layers",
            remedy=_DAMAGED,
        )
    eos = (special_id(file.metadata, role) for role in ("eos", "eot", "eom"))
    return LlamaConfig(
        vocab_size=_count(file, "vocab_size", len(file.metadata["tokenizer.ggml.tokens"])),
        hidden_size=hidden,
        intermediate_size=_count(file, "feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_count(file, "attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=_count(file, "context_length"),
        rms_norm_eps=_real(file, "attention.layer_norm_rms_epsilon"),
        rope_theta=_real(file, "rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file),
        tie_word_embeddings="lm_head.weight" not in names,
        attention_bias=any(".self_attn." in name and name.endswith(".bias") for name in names),
        mlp_bias=any(".mlp." in name and name.endswith(".bias") for name in names),
        bos_token_id=special_id(file.metadata, "bos"),
        eos_token_ids=tuple(dict.fromkeys(token for token in eos if token is not None)),
    )


def _rope_scaling(file: GgufFile) -> RopeScaling | None:
    """RoPE scaling as in llama.cpp: one factor, one factor per frequency, or the product of both."""
    kind = file.metadata.get("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"{file.path}: llama.rope.scaling.type is {kind!r}, expected 'none' or 'linear'",
            remedy="This type is not supported, and a guess would be wrong on long prompts only.",
        )
    # As in llama.cpp (load_hparams): a factor without a type is linear; 0 and type `none` disable it.
    factor = _real(file, "rope.scaling.factor", _real(file, "rope.scale_linear", 0.0)) or 1.0
    if kind == "none":
        factor = 1.0
    if not 0 < factor < float("inf"):
        raise CheckpointError(
            f"{file.path}: llama.rope.scaling.factor is {factor}, expected a positive number", remedy=_DAMAGED
        )
    if ROPE_FACTORS in file.tensors:
        factors = file.read(ROPE_FACTORS).double().flatten() * factor
        return RopeScaling("frequency_factors", factors=tuple(factors.tolist()))
    return None if factor == 1.0 else RopeScaling("linear", factor=factor)


def _license(file: GgufFile) -> str | None:
    name = file.metadata.get("general.license")
    if name == "other":
        name = file.metadata.get("general.license.name", name)
    return name if isinstance(name, str) else None


def _notes(file: GgufFile, given: Given | None) -> tuple[str, ...]:
    types = Counter(t.dtype for t in file.tensors.values() if t.dtype in QUANTIZED)
    if not types:
        return ()
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in types.most_common())
    # `-r as-is` needs the codes of every linear; the table may be of another type.
    linears = [t.dtype for name, t in file.tensors.items() if name.startswith("blk.") and len(t.shape) == 2]
    whole = given is not None and all(dtype in (*FLOATS, "Q4_0", "Q8_0") for dtype in linears)
    advice = (
        " `-r as-is` takes these codes as they are; other recipes round them a second time." if whole else ""
    )
    note = f"The source is quantized already (tensors: {kinds}): quality is measured against its dequantized weights."
    return (note + advice,)


def _count(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.metadata.get(f"llama.{key}", default)
    if type(value) is not int or not 0 < value < 2**31:
        raise CheckpointError(
            f"{file.path}: llama.{key} must be a positive integer, found {value!r:.60}", remedy=_DAMAGED
        )
    return value


def _real(file: GgufFile, key: str, default: float | None = None) -> float:
    value = file.metadata.get(f"llama.{key}", default)
    if type(value) not in (int, float):
        raise CheckpointError(
            f"{file.path}: llama.{key} must be a number, found {value!r:.60}", remedy=_DAMAGED
        )
    return float(value)
