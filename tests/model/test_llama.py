"""Llama against transformers.LlamaForCausalLM, on the same files and through the production loader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from edgellama.checkpoints import Checkpoint, open_checkpoint, streamed
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.checkpoints.weights import load_llama
from edgellama.model.config import LlamaConfig, RopeScaling
from edgellama.runtimes.reference import ReferenceRuntime
from tests.helpers.paths import TINY

CONTEXT, PREFILL = 96, 64
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# Wavelengths of the 8 frequencies: 6 to 20000 positions. With an original context of 32, llama3 keeps the
# first, blends the second and divides the others. So all of its branches run.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Case:
    """Cell of the matrix: keys of config.json, storage of the weights, and keys rewritten after saving."""

    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shard_size: str = "5GB"
    rewrite: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "plain": Case(),
    "float16": Case(dtype=torch.float16),
    "bfloat16": Case(dtype=torch.bfloat16),
    "sharded": Case(shard_size="40KB"),
    "tied": Case({"tie_word_embeddings": True}),
    "mha": Case({"num_key_value_heads": 4}),
    "mqa": Case({"num_key_value_heads": 1}),
    "head_dim": Case({"head_dim": 32}),
    "attention_bias": Case({"attention_bias": True}),
    "mlp_bias": Case({"mlp_bias": True}),
    "eps": Case({"rms_norm_eps": 1e-2}),
    "theta": Case({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "linear": Case({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama3": Case({"rope_parameters": {"rope_theta": 10000.0, **LLAMA3}}),
    "theta, old spelling": Case(rewrite={"rope_parameters": None, "rope_theta": 500000.0}),
    "default, old spelling": Case(
        rewrite={"rope_parameters": None, "rope_theta": 777.0, "rope_scaling": {"type": "default"}}
    ),
    "linear, old spelling": Case(
        rewrite={"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}
    ),
    "llama3, old spelling": Case(
        rewrite={"rope_parameters": None, "rope_theta": 50000.0, "rope_scaling": LLAMA3}
    ),
    "no head_dim, no kv heads": Case(
        {"num_key_value_heads": 4}, rewrite={"head_dim": None, "num_key_value_heads": None}
    ),
    "all at once": Case(
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_theta": 10000.0, **LLAMA3},
        },
        dtype=torch.bfloat16,
        shard_size="20KB",
    ),
}


def write_model(directory: Path, case: Case) -> None:
    """Writes a random model of the case with transformers. Biases and norms are random too, not 0 and 1."""
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 2,
            **case.config,
        }
    )
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.data = values + 1 if name.endswith("norm.weight") else values
    for parameter in model.parameters():
        parameter.data = parameter.data.to(case.dtype)
    model.save_pretrained(directory, max_shard_size=case.shard_size)
    edit_json(directory / "config.json", case.rewrite)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, directory)


def edit_json(file: Path, changes: Mapping[str, Any]) -> None:
    """Sets keys of the JSON object in a file. None removes a key."""
    data = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def random_tokens(vocab_size: int = 512) -> Tensor:
    return torch.randint(vocab_size, (1, CONTEXT), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference_logits(directory: Path, tokens: Tensor) -> Tensor:
    """Logits [T, vocab_size] of transformers' full forward, in float32 for files of any dtype."""
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits[0]


def assert_parity(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_prefill_decode_and_chunks_match_transformers(name: str, tmp_path: Path) -> None:
    write_model(tmp_path, CASES[name])
    tokens = random_tokens()
    expected = reference_logits(tmp_path, tokens)
    assert expected.std() > 1, "logits that hardly differ from one another would hide mistakes"
    checkpoint = open_checkpoint(tmp_path)
    assert {info.dtype for info in checkpoint.infos.values()} == {DTYPES[CASES[name].dtype]}
    assert (len(checkpoint.files) > 1) == (CASES[name].shard_size != "5GB")
    model = load_llama(checkpoint, CONTEXT)

    assert_parity(model(tokens[:, :PREFILL])[0], expected[:PREFILL])
    for position in range(PREFILL, CONTEXT):
        step = model.last_logits(tokens[:, position : position + 1], position)
        assert_parity(step[0], expected[position])

    # Again from the start, over cache positions that the first run filled.
    position = 0
    for length in (1, 7, 32, 2, CONTEXT - 42):
        chunk = tokens[:, position : position + length]
        assert_parity(model(chunk, position)[0], expected[position : position + length])
        position += length


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-6},
        {"rope_theta": 10001.0},
        {"rope_scaling": RopeScaling("linear", factor=1.001)},
        {"rope_scaling": RopeScaling("llama3", 4.0, 1.0, 4.0, 32)},
    ],
    ids=lambda change: next(iter(change)),
)
@torch.no_grad()
def test_a_wrong_constant_breaks_parity(change: dict[str, Any], tmp_path: Path) -> None:
    """Guards the matrix: slightly wrong constants move the logits beyond the limit."""
    write_model(tmp_path, CASES["plain"])
    tokens = random_tokens()
    checkpoint = open_checkpoint(tmp_path)
    wrong = replace(checkpoint, config=replace(checkpoint.config, **change))
    right_logits, wrong_logits = load_llama(checkpoint, CONTEXT)(tokens), load_llama(wrong, CONTEXT)(tokens)
    assert (right_logits - wrong_logits).abs().max() > 1e-3


@torch.no_grad()
def test_added_tokens_and_padded_vocabulary(tmp_path: Path) -> None:
    write_model(tmp_path, Case({"vocab_size": 520}))
    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    theirs.add_tokens(["<tool>", "<|extra|>"], special_tokens=True)
    theirs.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    text = "Call <tool> with 42<|extra|><|im_end|>\n"
    ids = checkpoint.tokenizer.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert checkpoint.tokenizer.size == 514
    assert {512, 513} < set(ids)
    tokens = torch.tensor([ids])
    assert_parity(load_llama(checkpoint, CONTEXT)(tokens)[0], reference_logits(tmp_path, tokens))


def test_eos_ids_of_both_files_are_joined(tmp_path: Path) -> None:
    write_model(tmp_path, Case({"eos_token_id": [2, 0]}))
    edit_json(tmp_path / "generation_config.json", {"eos_token_id": [0, 7]})
    config = open_checkpoint(tmp_path).config
    assert config.eos_token_ids == (2, 0, 7)
    assert config.bos_token_id == 0


@pytest.mark.parametrize("name", CASES)
def test_config_written_by_transformers_is_read_without_notes(name: str, tmp_path: Path) -> None:
    """Every key that transformers writes is known: used, or harmless by name."""
    write_model(tmp_path, CASES[name])
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.notes == ()
    assert LlamaConfig.from_dict(json.loads(json.dumps(checkpoint.config.to_dict()))) == checkpoint.config


@torch.no_grad()
def test_tiny_llama_matches_transformers() -> None:
    """The trained tiny model runs on text that it has learned to predict."""
    checkpoint: Checkpoint = open_checkpoint(TINY)
    ids = checkpoint.tokenizer.encode(
        "The two ladies were sitting together when Mr. Knightley came into the room. " * 5
    )
    tokens = torch.tensor([ids])
    expected = reference_logits(TINY, tokens)
    assert_parity(load_llama(checkpoint, len(ids))(tokens)[0], expected)
    loss = torch.nn.functional.cross_entropy(expected[:-1], tokens[0, 1:])
    assert loss < 4, f"{loss:.2f} nats per token is not what a trained model gives (uniform: 6.24)"


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
def test_logits_of_one_layer_at_a_time_equal_those_of_the_model(
    kept_bytes: int, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences have several lengths, and logits start at any position."""
    sequences, starts = [[5, 9, 200, 3], list(range(40)), [7]], [0, 24, 0]
    model = load_llama(tiny_checkpoint, 40)
    monkeypatch.setattr(streamed, "KEPT_BYTES", kept_bytes)
    full = StreamedLlama(tiny_checkpoint)
    full.read_ahead(sequences)
    for tokens, start in zip(sequences, starts, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([tokens]))[0, start:]
        torch.testing.assert_close(full.logits(tokens, slice(start, None)), expected, rtol=1e-5, atol=1e-5)
    weights = sum(weight.numel() for weight in full.model.model.layers.parameters() if not weight.is_meta)
    assert bool(weights) is bool(kept_bytes)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
def test_greedy_text_of_one_layer_at_a_time(
    kept_bytes: int, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "KEPT_BYTES", kept_bytes)
    prompts = [[5, 9, 200, 3], [7, 7, 8, 30]]
    continued = StreamedLlama(tiny_checkpoint).continue_greedily(prompts, 6)
    runtime = ReferenceRuntime(load_llama(tiny_checkpoint, 16))
    for prompt, continuation in zip(prompts, continued, strict=True):
        runtime.reset()
        logits = runtime.forward(prompt)
        for token in continuation:
            assert token == int(logits.argmax())
            logits = runtime.forward([token])
