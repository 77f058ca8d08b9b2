"""Weights and config of small GGUF files against the models that they were converted from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Ggml

from edgellama.checkpoints import open_checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.errors import CheckpointError
from edgellama.model.config import LlamaConfig, RopeScaling
from edgellama.model.llama import inverse_frequencies
from tests.helpers.gguf_models import Source, convert, smollm2, source, tiny_config

KINDS = [Ggml.F32, Ggml.F16, Ggml.BF16, Ggml.Q8_0, Ggml.Q4_0, Ggml.Q4_1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_logits_are_those_of_the_source(tmp_path: Path, kind: Ggml) -> None:
    model = source(tiny_config())
    path = convert(model, kind).write(tmp_path / "model.gguf")
    # Blocks lie within rows, so rounding the unpermuted Hugging Face rows gives the same values.
    rounded = {
        name: torch.from_numpy(gguf.dequantize(gguf.quantize(w.numpy(), kind), kind)) if w.ndim == 2 else w
        for name, w in model.weights.items()
    }
    _assert_same_logits(path, replace(model, weights=rounded))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4, "tie_word_embeddings": False},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    ],
    ids=["mha-untied", "head-dim", "biases"],
)
def test_shapes_of_attention(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = source(tiny_config(**changes))
    _assert_same_logits(convert(model).write(tmp_path / "model.gguf"), model)


def test_rope_frequency_factors(tmp_path: Path) -> None:
    """Llama 3.1 in GGUF stores the scaling as a tensor of divisors. No metadata key names it."""
    llama3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    model = source(tiny_config(rope_scaling=llama3))
    plain = replace(model.config, rope_scaling=None)
    conversion = convert(model)
    factors = inverse_frequencies(plain) / inverse_frequencies(model.config)
    assert factors.max() > 7.9 and factors.min() == 1
    conversion.tensors["rope_freqs.weight"] = factors.numpy()
    path = conversion.write(tmp_path / "model.gguf")
    _assert_same_logits(path, model)
    scaling = open_checkpoint(path).config.rope_scaling
    assert scaling is not None and scaling.factors == pytest.approx(factors.tolist())

    conversion.metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    both = open_checkpoint(conversion.write(tmp_path / "both.gguf")).config.rope_scaling
    assert both is not None and both.factors == pytest.approx((2 * factors).tolist())


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"llama.rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"llama.rope.scale_linear": 4.0}, RopeScaling("linear", 4.0)),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, None),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
    ],
)
def test_rope_scaling_keys(tmp_path: Path, keys: dict[str, Any], expected: RopeScaling | None) -> None:
    conversion = convert(source(tiny_config()))
    conversion.metadata |= keys
    assert open_checkpoint(conversion.write(tmp_path / "model.gguf")).config.rope_scaling == expected


def test_config_is_exactly_that_of_the_source(tmp_path: Path) -> None:
    # 1e-6 is not a float32 number. A reader that does not round back gives 9.999999974752427e-07.
    model = source(tiny_config(rms_norm_eps=1e-6, rope_theta=1e6))
    conversion = convert(model)
    conversion.metadata |= {
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eom_token_id": 4,
    }
    checkpoint = open_checkpoint(conversion.write(tmp_path / "model.gguf"))
    bos = model.tokenizer["tokenizer.ggml.bos_token_id"]
    assert checkpoint.config == replace(model.config, bos_token_id=bos, eos_token_ids=(7, 5, 4))
    assert (checkpoint.license, checkpoint.format) == ("mit", "gguf")


def test_config_without_derivable_keys(tmp_path: Path) -> None:
    """Files of older converters omit keys that follow from the others."""
    model = source(tiny_config(num_key_value_heads=4))
    conversion = convert(model)
    for key in (
        "llama.attention.head_count_kv",
        "llama.attention.key_length",
        "llama.attention.value_length",
        "llama.rope.dimension_count",
        "llama.rope.freq_base",
        "llama.vocab_size",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id",
    ):
        del conversion.metadata[key]
    conversion.metadata |= {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 7}
    config = open_checkpoint(conversion.write(tmp_path / "model.gguf")).config
    assert config == replace(model.config, rope_theta=10000.0, eos_token_ids=(7,))


def test_float32_tensors_stay_in_the_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(convert(source(tiny_config())).write(tmp_path / "model.gguf"))
    first, second = (checkpoint.tensor("model.embed_tokens.weight") for _ in range(2))
    assert first.data_ptr() == second.data_ptr()


def test_quantized_sources_are_noted(tmp_path: Path) -> None:
    model = source(tiny_config())
    notes = open_checkpoint(convert(model, Ggml.F16).write(tmp_path / "a.gguf")).notes
    assert not any("quantized already" in note for note in notes)
    checkpoint = open_checkpoint(convert(model, Ggml.Q4_1).write(tmp_path / "b.gguf"))
    assert "15 Q4_1" in checkpoint.notes[0]
    info = checkpoint.infos["model.layers.1.self_attn.k_proj.weight"]
    assert (info.dtype, info.shape, info.nbytes) == ("Q4_1", (128, 256), 128 * 256 * 5 // 8)


def _assert_same_logits(path: Path, model: Source) -> None:
    checkpoint = open_checkpoint(path)
    tokens = torch.randint(model.config.vocab_size, (1, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        actual = load_llama(checkpoint, 96)(tokens)
    torch.testing.assert_close(actual, model.logits(tokens), atol=2e-5, rtol=1e-5)


# Blocks, decoded one weight at a time from the layouts in ggml-common.h.


def _half(block: bytes, at: int) -> float:
    return float(np.frombuffer(block[at : at + 2], np.float16)[0])


def _q8_0(block: bytes) -> list[float]:
    d = _half(block, 0)
    return [d * int(np.int8(np.uint8(b))) for b in block[2:34]]


def _q4_0(block: bytes) -> list[float]:
    d = _half(block, 0)
    return [d * ((block[2 + i % 16] >> 4 * (i // 16) & 15) - 8) for i in range(32)]


def _q4_1(block: bytes) -> list[float]:
    d, m = _half(block, 0), _half(block, 2)
    return [d * (block[4 + i % 16] >> 4 * (i // 16) & 15) + m for i in range(32)]


def _scale_and_min(packed: bytes, j: int) -> tuple[int, int]:
    """6-bit scale and minimum of sub-block j: the first four plain, the last four split over two bytes."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4


def _q4_k(block: bytes) -> list[float]:
    d, dmin, weights = _half(block, 0), _half(block, 2), []
    for i in range(256):
        scale, minimum = _scale_and_min(block[4:16], i // 32)
        code = block[16 + i // 64 * 32 + i % 32] >> 4 * (i // 32 % 2) & 15
        weights.append(d * scale * code - dmin * minimum)
    return weights


def _q5_k(block: bytes) -> list[float]:
    d, dmin, weights = _half(block, 0), _half(block, 2), []
    for i in range(256):
        scale, minimum = _scale_and_min(block[4:16], i // 32)
        low = block[48 + i // 64 * 32 + i % 32] >> 4 * (i // 32 % 2) & 15
        high = block[16 + i % 32] >> i // 32 & 1
        weights.append(d * scale * (low + 16 * high) - dmin * minimum)
    return weights


def _q6_k(block: bytes) -> list[float]:
    d, weights = _half(block, 208), []
    for i in range(256):
        half, part, column = i // 128, i % 128 // 32, i % 32
        low = block[64 * half + 32 * (part % 2) + column] >> 4 * (part // 2) & 15
        high = block[128 + 32 * half + column] >> 2 * part & 3
        scale = int(np.int8(np.uint8(block[192 + i // 16])))
        weights.append(d * scale * (low + 16 * high - 32))
    return weights


# Per type: bytes of a block, offsets of its float16 scales, scalar decoder.
BLOCKS: dict[Ggml, tuple[int, tuple[int, ...], Callable[[bytes], list[float]]]] = {
    Ggml.Q8_0: (34, (0,), _q8_0),
    Ggml.Q4_0: (18, (0,), _q4_0),
    Ggml.Q4_1: (20, (0, 2), _q4_1),
    Ggml.Q4_K: (144, (0, 2), _q4_k),
    Ggml.Q5_K: (176, (0, 2), _q5_k),
    Ggml.Q6_K: (210, (208,), _q6_k),
}


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_blocks_are_decoded_as_ggml_lays_them_out(tmp_path: Path, kind: Ggml) -> None:
    size, scales, decode = BLOCKS[kind]
    rng = np.random.default_rng(3)
    conversion = convert(source(tiny_config(num_hidden_layers=1, intermediate_size=512)))
    per_row = 512 // len(decode(bytes(size)))
    blocks = rng.integers(0, 256, (256 * per_row, size), np.uint8)
    for at in scales:
        blocks[:, at : at + 2] = (rng.normal(size=(len(blocks), 1)) / 50).astype(np.float16).view(np.uint8)
    conversion.tensors["blk.0.ffn_down.weight"] = blocks.reshape(256, per_row * size)
    conversion.types["blk.0.ffn_down.weight"] = kind
    checkpoint = open_checkpoint(conversion.write(tmp_path / "model.gguf"))
    actual = checkpoint.tensor("model.layers.0.mlp.down_proj.weight")
    expected = torch.tensor([decode(block.tobytes()) for block in blocks]).view(256, 512)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_infinite_scale_is_reported_by_name(tmp_path: Path, kind: Ggml) -> None:
    size, scales, decode = BLOCKS[kind]
    conversion = convert(source(tiny_config(num_hidden_layers=1)))
    blocks = np.zeros((256, 256 // len(decode(bytes(size))), size), np.uint8)
    blocks[5, 0, scales[0] : scales[0] + 2] = np.array([np.inf], np.float16).view(np.uint8)
    conversion.tensors["blk.0.ffn_up.weight"] = blocks.reshape(256, -1)
    conversion.types["blk.0.ffn_up.weight"] = kind
    checkpoint = open_checkpoint(conversion.write(tmp_path / "model.gguf"))
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight holds \d+ values that are NaN"):
        checkpoint.tensor("model.layers.0.mlp.up_proj.weight")


def test_smollm2() -> None:
    checkpoint = open_checkpoint(smollm2())
    assert checkpoint.config == LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    assert checkpoint.license == "apache-2.0"
    tokenizer = checkpoint.tokenizer
    assert tokenizer.chat_template is not None and "<|im_start|>assistant" in tokenizer.chat_template
    assert (tokenizer.size, tokenizer.bos_token, tokenizer.eos_token) == (49152, "<|im_start|>", "<|im_end|>")
    # Digits stand alone. Otherwise the two spaces before 1234 are two tokens instead of the single token 256,
    # as in transformers' own conversion of this file.
    text = "at  1234,\n\n  it's <|im_start|>user\nHéllo 你好 🙂 x=12.5"
    ids = [261, 256, 33, 34, 35, 36, 28, 8866, 357, 506, 216, 1, 4093, 198, 56, 2756, 31394, 216]
    ids += [18645, 250, 48392, 138, 47526, 1792, 45, 33, 34, 30, 37]
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
