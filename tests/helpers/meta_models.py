"""Small checkpoints in Meta's layout: a tokenizer.model, weights and params.json."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from edgellama.checkpoints.meta_params import meta_config
from edgellama.model.config import LlamaConfig
from edgellama.text.token_stream import BYTE_OF_CHARACTER
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.tokenizer_json import LLAMA3_SPLIT
from tests.helpers.paths import DATA

# Meta's defaults for dim 64: 4 * 64 * 2 / 3 = 170, times 1.3 = 221, up to a multiple of 32 = 224.
PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": -1,
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_seq_len": 128,
}


@cache
def ranks() -> dict[bytes, int]:
    """Ranks of a small byte-level BPE, in the form of tiktoken."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([training_text()], trainer)
    return {bytes(BYTE_OF_CHARACTER[c] for c in token): i for token, i in trained.get_vocab().items()}


def tiktoken_file(ranks: Mapping[bytes, int]) -> bytes:
    """Content of a tokenizer.model: one line a token, base64 and rank."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


@cache
def training_text() -> str:
    """Prose, code and characters outside ASCII for the BPE."""
    code = (DATA / "calibration_python_tutorial.rst").read_text()[:20000]
    return (DATA / "evaluation_persuasion.txt").read_text()[:30000] + code + "你好🙂é\n" * 40


def directory(path: Path, tokenizer_model: bytes) -> Path:
    """Writes tokenizer.model into an existing directory, which it returns."""
    (path / "tokenizer.model").write_bytes(tokenizer_model)
    return path


META_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attention_norm",
    "model.layers": "layers",
}


def source_model(**changes: Any) -> transformers.LlamaForCausalLM:
    """A random Llama of transformers with the shapes of PARAMS, except for `changes` of its config."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": len(ranks()) + 256,
            "hidden_size": 64,
            "intermediate_size": 224,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    return transformers.LlamaForCausalLM(config)


def meta_weights(model: transformers.LlamaForCausalLM) -> dict[str, Tensor]:
    """Weights in Meta's layout: rows 2i and 2i + 1 of a head are the first and second of a rotated pair."""
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            heads = tensor.view(-1, 16, 64)
            interleaved = torch.empty_like(heads)
            interleaved[:, 0::2], interleaved[:, 1::2] = heads[:, :8], heads[:, 8:]
            tensor = interleaved.view(-1, 64)
        for hf, meta in META_NAMES.items():
            name = name.replace(hf, meta)
        weights[name] = tensor.clone()
    return weights | {"rope.freqs": torch.arange(8.0)}


def shard(weights: Mapping[str, Tensor], index: int, count: int, *, embedding: int) -> dict[str, Tensor]:
    """Tensors of rank `index` of `count`: rows of wq and similar, columns of wo and w2, norms unsplit.

    `embedding` is the dimension along which tok_embeddings is split.
    """
    tensors_of_rank = {}
    for name, tensor in weights.items():
        dimension = 1 if "wo." in name or "w2." in name else embedding if "tok_embeddings" in name else 0
        unsplit = "norm" in name or name == "rope.freqs"
        tensors_of_rank[name] = tensor if unsplit else tensor.chunk(count, dimension)[index].clone()
    return tensors_of_rank


def write(path: Path, *shards: Mapping[str, Any], params: Mapping[str, Any] = PARAMS) -> Path:
    """Writes a Meta checkpoint with these shards into an existing directory, which it returns."""
    for i, tensors in enumerate(shards):
        torch.save(dict(tensors), path / f"consolidated.{i:02d}.pth")
    (path / "params.json").write_text(json.dumps(params))
    return directory(path, tiktoken_file(ranks()))


def config_of(**params: Any) -> LlamaConfig:
    """Config that edgellama reads from PARAMS with these changes. The value `...` removes a key."""
    present = {key: value for key, value in {**PARAMS, **params}.items() if value is not ...}
    tokenizer = Tokenizer({"tokenizer.json": tokenizers.Tokenizer(tokenizers.models.BPE()).to_str().encode()})
    return meta_config(present, tokenizer, rows=present.get("rows", 32000), tied=False)
