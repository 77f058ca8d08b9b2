"""Small Hugging Face checkpoints with the oddities of fine-tunes: files that disagree, are missing or left over."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor

from edgellama.model.config import LlamaConfig
from edgellama.text.tokenizer_json import LLAMA3_SPLIT

CORPUS = [
    "The capital of France is Paris, and it is known for 12345 things.",
    "Hello world! We'll see; they don't mind.",
    "def f(x):\n    return x + 1\n\n  indented\ttext",
    "user assistant system naive cafe ünïcödé",
] * 8
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llama3_bpe(extra: tuple[str, ...] = (IM_START, IM_END)) -> tokenizers.Tokenizer:
    """A byte-level BPE that splits as Llama 3 does. Its last ids are bos, eos and the extra tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([BOS, EOS, *extra])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def weights(config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Random weights of a config.json, by Hugging Face name."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.ones(shape) if len(shape) == 1 else 0.3 * torch.randn(shape, generator=generator)).to(
            dtype
        )
        for name, shape in LlamaConfig.from_hf(config).tensor_shapes().items()
    }


def write_checkpoint(
    directory: Path,
    *,
    tokenizer: tokenizers.Tokenizer | None = None,
    config: Mapping[str, Any] | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
    rows: int | None = None,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> Path:
    """Writes a sound one-layer Llama with the given differences.

    Args:
        directory: the directory to make.
        tokenizer: its tokenizer.json.
        config, tokenizer_config: changes of the two files.
        files: further files by name, JSON data or text.
        rows: rows of the embedding; None for one for each token.
        change: changes the weights before they are saved.
    """
    directory.mkdir()
    tokenizer = tokenizer or llama3_bpe()
    tokenizer.save(str(directory / "tokenizer.json"))
    data = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": rows or tokenizer.get_vocab_size(with_added_tokens=True),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        **(config or {}),
    }
    settings = {
        "bos_token": BOS,
        "eos_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **(tokenizer_config or {}),
    }
    contents = {"config.json": data, "tokenizer_config.json": settings, **(files or {})}
    for name, content in contents.items():
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    neutral = {key: value for key, value in data.items() if key != "quantization_config"}
    save_file(change(weights(neutral)), directory / "model.safetensors")
    return directory
