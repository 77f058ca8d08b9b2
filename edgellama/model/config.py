"""LlamaConfig: the numbers that define a Llama, under the names of Hugging Face's config.json.

No torch is imported, so that `inspect` and error messages stay fast. Unknown settings are refused: every key
that would change the computation is either used here or must hold its neutral value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from edgellama.errors import CheckpointError

ROPE_TYPES = ("default", "linear", "llama3", "frequency_factors")

# More means a damaged file. Without a limit, `tensor_shapes` would name the tensors of a billion layers.
MAX_LAYERS = 1024

# Keys that change the computation, each with its neutral values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alibi": (None, False),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "auto_map": (None, {}),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "final_logit_softcapping": (None,),
    "hidden_act": ("silu", "swish"),
    "logits_scaling": (None, 1, 1.0),
    "moe_intermediate_size": (None, 0),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "partial_rotary_factor": (None, 1, 1.0),
    "per_layer_config": (None, {}),
    "qk_norm": (None, False),
    "residual_multiplier": (None, 1, 1.0),
    "rope_interleaved": (None, False),
    "sliding_window": (None,),
    "use_qk_norm": (None, False),
    "use_sliding_window": (None, False),
}

# Values of `architectures` for the plain Llama: the current name, the name in the first conversions, and the
# name of a headless model.
ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel")
SEQUENCE_CLASSIFIER = "LlamaForSequenceClassification"
DEFAULT_LABELS = 2  # that transformers leaves out of config.json

_REMEDIES = {
    "auto_map": "The repository brings its own model code; if that computes the plain Llama, remove auto_map from config.json.",
    "sliding_window": "Sliding-window attention is not a Llama; give a checkpoint without it.",
}


@dataclass(frozen=True)
class RopeScaling:
    """RoPE scaling: stretches the rotary frequencies for a longer context.

    rope_type `linear`: divides every frequency by `factor`.
    rope_type `llama3`: divides the frequencies of long wavelengths by `factor` and blends the middle ones
    (Llama 3.1 model card, `rope_scaling`).
    rope_type `frequency_factors`: divides frequency i by `factors[i]`. GGUF files store any scheme in this
    form (tensor `rope_freqs.weight`).
    """

    rope_type: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and constants of one Llama, under the keys of config.json.

    eos_token_ids: ids that end an answer. `from_hf` takes those of config.json and generation_config.json;
    a reader adds those that the tokenizer and its template name (edgellama.text.stop_tokens).
    label_rows: rows of a classifier's output layer (edgellama.model.labels); None for a model of the next token.

    Raises CheckpointError for impossible values.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    label_rows: int | None = None

    def __post_init__(self) -> None:
        if self.label_rows is not None and (self.label_rows < 2 or self.tie_word_embeddings):
            raise _impossible(
                f"a classifier has 2 rows in its output layer at least, and no tied one, got {self.label_rows!r}"
            )
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise _impossible(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.num_hidden_layers > MAX_LAYERS:
            raise _bad(f"num_hidden_layers must be at most {MAX_LAYERS}, got {self.num_hidden_layers}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise _impossible(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise _impossible(f"head_dim must be even, since RoPE rotates pairs, got {self.head_dim}")
        if not 0 < self.rms_norm_eps < 1:
            raise _impossible(f"rms_norm_eps must lie between 0 and 1, got {self.rms_norm_eps!r}")
        if not self.rope_theta > 0:
            raise _impossible(f"rope_theta must be positive, got {self.rope_theta!r}")
        scaling = self.rope_scaling
        if scaling is not None and scaling.rope_type == "frequency_factors":
            if len(scaling.factors) != self.head_dim // 2:
                raise _impossible(
                    f"the rope frequencies tensor has {len(scaling.factors)} entries, expected head_dim / 2 = "
                    f"{self.head_dim // 2}"
                )
            if not all(0 < f < float("inf") for f in scaling.factors):
                raise _impossible(
                    "the rope frequencies tensor holds factors that are not positive and finite"
                )

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> LlamaConfig:
        """Reads the contents of config.json and, for more eos ids, of generation_config.json (`generation`).

        Raises CheckpointError for another architecture and for any key that would change the computation.
        """
        if data.get("model_type") != "llama":
            raise CheckpointError(
                f"config.json: model_type is {data.get('model_type')!r}, expected 'llama'",
                remedy="edgellama exports the Llama architecture only (Llama 2 and 3, SmolLM, SmolLM2 and their fine-tunes).",
            )
        architectures = data.get("architectures") or ["LlamaForCausalLM"]
        classifier = architectures == [SEQUENCE_CLASSIFIER]
        if not classifier and (
            not isinstance(architectures, list) or not any(name in ARCHITECTURES for name in architectures)
        ):
            raise CheckpointError(
                f"config.json: architectures is {_short(architectures)}, expected 'LlamaForCausalLM'",
                remedy="edgellama exports models of the next token, and those that classify a text "
                f"({SEQUENCE_CLASSIFIER}), without other heads or changed layers.",
            )
        for key, neutral in NEUTRAL.items():
            if key in data and data[key] not in neutral:
                raise CheckpointError(
                    f"config.json: {key} is {_short(data[key])}, expected {_short(neutral[0])}: "
                    "this changes the computation in a way that the plain Llama does not have",
                    remedy=_REMEDIES.get(key, "Give a checkpoint of the plain Llama architecture."),
                )
        kinds = data.get("layer_types") or []
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise _bad(f"layer_types is {_short(kinds)}, expected only 'full_attention'")
        heads = _int(data, "num_attention_heads")
        hidden = _int(data, "hidden_size")
        if data.get("head_dim") is None and hidden % heads:
            raise _bad(
                f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads}), and no head_dim is given"
            )
        theta, scaling = _rope(data)
        eos = (*end_ids(data, "config.json"), *end_ids(generation or {}, "generation_config.json"))
        bos = data.get("bos_token_id")
        if bos is not None and not _is_id(bos):
            raise _bad(f"bos_token_id must be a token id or null, got {_short(bos)}")
        return cls(
            vocab_size=_int(data, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_int(data, "intermediate_size"),
            num_hidden_layers=_int(data, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_int(data, "num_key_value_heads", heads),
            head_dim=_int(data, "head_dim", hidden // heads),
            max_position_embeddings=_int(data, "max_position_embeddings", 2048),
            rms_norm_eps=_float(data, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_bool(data, "tie_word_embeddings") and not classifier,
            attention_bias=_bool(data, "attention_bias"),
            mlp_bias=_bool(data, "mlp_bias"),
            bos_token_id=bos,
            eos_token_ids=tuple(dict.fromkeys(eos)),
            label_rows=_label_rows(data) if classifier else None,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LlamaConfig:
        """Inverse of `to_dict`, for manifests. Other keys are ignored."""
        field_names = {f.name for f in fields(cls)}
        values = {key: value for key, value in data.items() if key in field_names}
        scaling = values.get("rope_scaling")
        if scaling is not None:
            values["rope_scaling"] = RopeScaling(**{**scaling, "factors": tuple(scaling["factors"])})
        values["eos_token_ids"] = tuple(values.get("eos_token_ids", ()))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON data. `label_rows` is there for a classifier only."""
        data = asdict(self)
        if self.label_rows is None:
            del data["label_rows"]
        return data

    @property
    def output_size(self) -> int:
        """Number of logits of a position: of the labels' rows, or of the vocabulary."""
        return self.vocab_size if self.label_rows is None else self.label_rows

    @property
    def is_classifier(self) -> bool:
        """True for a model whose logits are those of labels. It has no next token, and no perplexity."""
        return self.label_rows is not None

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight in a checkpoint of this config, by Hugging Face name.

        Linear weights are [out_features, in_features]. A tied lm_head has no entry.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        linears = {
            "self_attn.q_proj": (q, hidden, self.attention_bias),
            "self_attn.k_proj": (kv, hidden, self.attention_bias),
            "self_attn.v_proj": (kv, hidden, self.attention_bias),
            "self_attn.o_proj": (hidden, q, self.attention_bias),
            "mlp.gate_proj": (inner, hidden, self.mlp_bias),
            "mlp.up_proj": (inner, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, inner, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for i in range(self.num_hidden_layers):
            prefix = f"model.layers.{i}"
            shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
            for name, (rows, columns, bias) in linears.items():
                shapes[f"{prefix}.{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{prefix}.{name}.bias"] = (rows,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.output_size, hidden)
        return shapes

    @property
    def parameters(self) -> int:
        """Number of weights. Tied weights count once."""
        total = 0
        for shape in self.tensor_shapes().values():
            count = 1
            for size in shape:
                count *= size
            total += count
        return total


def _label_rows(data: Mapping[str, Any]) -> int:
    """Number of labels of a sequence classifier. Raises CheckpointError for a kind of labels that is not exported."""
    names = data.get("id2label")
    count = len(names) if isinstance(names, Mapping) else _int(data, "num_labels", DEFAULT_LABELS)
    kind = data.get("problem_type")
    if kind not in (None, "single_label_classification") or count < 2:
        raise CheckpointError(
            f"config.json: problem_type is {_short(kind)} with {count} labels, expected one label of several for a text",
            remedy="Regression and several labels a text are not exported: the gate compares a distribution over labels.",
        )
    return count


def _rope(data: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling), from `rope_theta` and `rope_scaling` or from the newer `rope_parameters`.

    Raises CheckpointError if two places give different values. transformers picks one without a warning.
    """
    outer = {key: data.get(key) for key in ("rope_theta", "original_max_position_embeddings")}
    rope: dict[str, Any] = {}
    for place in (outer, data.get("rope_scaling") or {}, data.get("rope_parameters") or {}):
        if not isinstance(place, Mapping):
            raise _bad(f"rope_scaling and rope_parameters must be objects, got {_short(place)}")
        for key, value in place.items():
            if isinstance(value, Mapping):
                raise _bad(
                    f"rope_parameters holds a set of its own for {key!r}, expected one set for all layers"
                )
            rope[key] = _agreed(key, rope.get(key), value)
    if _float(rope, "partial_rotary_factor", 1.0) != 1.0:
        raise _bad(f"partial_rotary_factor is {rope['partial_rotary_factor']}, expected 1")
    rope_type = _agreed("rope_type", rope.get("rope_type"), rope.get("type")) or "default"
    theta = _float(rope, "rope_theta", 10000.0)
    if rope_type == "default":
        if _float(rope, "factor", 1.0) != 1.0:
            raise _bad(f"rope_scaling has factor {rope['factor']} and no rope_type, so its method is unknown")
        return theta, None
    if rope_type == "linear":
        return theta, RopeScaling("linear", factor=_positive(rope, "factor"))
    if rope_type == "llama3":
        low, high = _positive(rope, "low_freq_factor"), _positive(rope, "high_freq_factor")
        if not low < high:
            raise _bad(f"rope_scaling: low_freq_factor ({low}) must be below high_freq_factor ({high})")
        original = _int(rope, "original_max_position_embeddings")
        return theta, RopeScaling("llama3", _positive(rope, "factor"), low, high, original)
    raise CheckpointError(
        f"config.json: rope_type is {_short(rope_type)}, expected one of 'default', 'linear', 'llama3'",
        remedy="A RoPE that is guessed gives a model that is wrong only on long prompts; this type is not supported.",
    )


def _agreed(key: str, one: Any, other: Any) -> Any:
    """Returns the value that is given. Raises CheckpointError if both are given and differ."""
    if one is not None and other is not None and one != other:
        raise _bad(f"{key} is given twice, as {_short(one)} and as {_short(other)}")
    return other if one is None else one


def _impossible(what: str) -> CheckpointError:
    # The config may come from config.json, params.json or GGUF metadata.
    return CheckpointError(
        f"the model's config: {what}", remedy="Check the checkpoint against the model's original one."
    )


def _bad(what: str) -> CheckpointError:
    return CheckpointError(f"config.json: {what}", remedy="Check the file against the model's original one.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def end_ids(data: Mapping[str, Any], file: str) -> list[int]:
    """`eos_token_id` as a list. The key may be absent, null, one id or a list of ids.

    Raises CheckpointError, naming `file`, for anything else.
    """
    value = data.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(_is_id(i) for i in ids):
        raise CheckpointError(
            f"{file}: eos_token_id must be a token id or a list of them, got {_short(value)}",
            remedy="Check the file against the model's original one.",
        )
    return ids


def _bool(data: Mapping[str, Any], key: str) -> bool:
    value = data.get(key)
    if value is not None and not isinstance(value, bool):
        raise _bad(f"{key} must be true or false, got {_short(value)}")
    return bool(value)


def _int(data: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = data.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise _bad(f"{key} must be a positive integer, got {_short(value)}")
    return value


def _float(data: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = data.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e38:
        raise _bad(f"{key} must be a finite number, got {_short(value)}")
    return float(value)


def _positive(data: Mapping[str, Any], key: str) -> float:
    value = _float(data, key)
    if not value > 0:
        raise _bad(f"{key} must be positive, got {value!r}")
    return value
