"""Damaged GGUF files and files of models other than the plain Llama, each refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Ggml

from edgellama.checkpoints import open_checkpoint
from edgellama.errors import CheckpointError, EdgellamaError, TokenizerError
from tests.helpers.gguf_models import Conversion, convert, source, tiny_config

Change = Callable[[Conversion], None]


def keys(**changes: Any) -> Change:
    """Change of metadata: `__` in a key stands for a dot, and None removes the key."""

    def change(conversion: Conversion) -> None:
        for name, value in changes.items():
            key = name.replace("__", ".")
            conversion.metadata.pop(key, None)
            if value is not None:
                conversion.metadata[key] = value

    return change


def items(key: str, edit: Callable[[list[Any]], None]) -> Change:
    """Change of a list in the tokenizer's metadata."""
    return lambda conversion: edit(conversion.metadata[f"tokenizer.ggml.{key}"])


def attribute(name: str, value: Any) -> Change:
    """Change of a field of the conversion."""
    return lambda conversion: setattr(conversion, name, value)


def add_tensor(name: str, shape: tuple[int, ...], kind: Ggml = Ggml.F32) -> Change:
    """Adds a tensor of ones, or replaces one."""

    def change(conversion: Conversion) -> None:
        integers = kind is Ggml.I8
        conversion.tensors[name] = (
            np.ones(shape, np.int8) if integers else gguf.quantize(np.ones(shape, np.float32), kind)
        )
        conversion.types[name] = kind

    return change


def both(first: Change, second: Change) -> Change:
    """Applies two changes in order."""

    def change(conversion: Conversion) -> None:
        first(conversion)
        second(conversion)

    return change


def to_sentencepiece(conversion: Conversion) -> None:
    """Relabels the tokenizer's metadata as a SentencePiece model with descending scores."""
    size = len(conversion.metadata["tokenizer.ggml.tokens"])
    conversion.metadata["tokenizer.ggml.model"] = "llama"
    conversion.metadata["tokenizer.ggml.scores"] = [-float(i) for i in range(size)]


CHECKPOINT_REFUSALS: dict[str, tuple[Change, str]] = {
    "another-architecture": (attribute("architecture", "qwen2"), "'qwen2', expected 'llama'"),
    "adapter": (keys(general__type="adapter"), "general.type is 'adapter'"),
    "split": (keys(split__count=3), "one of 3 parts (split.count), and its name"),
    "big-endian": (attribute("endianess", gguf.GGUFEndian.BIG), "big-endian"),
    "old-quantization": (keys(general__quantization_version=1), "quantization_version is 1, expected 2"),
    "experts": (keys(llama__expert_count=8), "llama.expert_count is 8, expected 0"),
    "sliding-window": (keys(llama__attention__sliding_window=4096), "sliding_window is 4096, expected 0"),
    "attention-scale": (keys(llama__attention__scale=0.5), "llama.attention.scale is 0.5, expected 0"),
    "softcapping": (keys(llama__final_logit_softcapping=30.0), "final_logit_softcapping is 30.0"),
    "not-causal": (keys(llama__attention__causal=False), "llama.attention.causal is False"),
    "unknown-key": (keys(llama__swin_norm=True), "llama.swin_norm = True is not a key"),
    "yarn": (keys(llama__rope__scaling__type="yarn"), "rope.scaling.type is 'yarn'"),
    "rope-factor": (keys(llama__rope__scaling__factor=-2.0), "rope.scaling.factor is -2.0"),
    "partial-rotary": (
        keys(llama__rope__dimension_count=32),
        "rope.dimension_count is 32, expected the head size 64",
    ),
    "value-length": (keys(llama__attention__value_length=32), "value_length is 32"),
    "odd-head": (
        keys(
            llama__attention__key_length=63,
            llama__attention__value_length=63,
            llama__rope__dimension_count=63,
        ),
        "head_dim must be even",
    ),
    "heads-per-layer": (
        keys(llama__attention__head_count=[4, 4]),
        "head_count must be a positive integer, found [4, 4]",
    ),
    "no-embedding-length": (
        keys(llama__embedding_length=None),
        "llama.embedding_length must be a positive integer, found None",
    ),
    "no-eps": (
        keys(llama__attention__layer_norm_rms_epsilon=None),
        "layer_norm_rms_epsilon must be a number, found None",
    ),
    "eps-zero": (keys(llama__attention__layer_norm_rms_epsilon=0.0), "rms_norm_eps must lie between 0 and 1"),
    "layers-missing": (keys(llama__block_count=3), "block_count is 3, and there are tensors of 2 layers"),
    "layers-too-many": (keys(llama__block_count=1), "block_count is 1, and there are tensors of 2 layers"),
    "tensor-type": (
        add_tensor("blk.0.ffn_up.weight", (256, 256), Ggml.I8),
        "ffn_up.weight has type I8, expected one of F32",
    ),
    "tensor-unknown": (
        add_tensor("blk.0.attn_q_norm.weight", (64,)),
        "plain Llama does not have: blk.0.attn_q_norm.weight",
    ),
    "tensor-missing": (
        lambda c: c.tensors.__delitem__("blk.1.attn_v.weight"),
        "missing: model.layers.1.self_attn.v_proj.weight",
    ),
    "tensor-shape": (
        add_tensor("blk.1.attn_v.weight", (64, 256)),
        "v_proj.weight has shape [64, 256], expected [128, 256]",
    ),
    "norm-bias": (
        add_tensor("blk.1.attn_norm.bias", (256,)),
        "not expected: model.layers.1.input_layernorm.bias",
    ),
    "rope-factors": (add_tensor("rope_freqs.weight", (16,)), "has 16 entries, expected head_dim / 2 = 32"),
    "vocabulary": (keys(llama__vocab_size=700), "embed_tokens.weight has shape"),
}
TOKENIZER_REFUSALS: dict[str, tuple[Change, str]] = {
    "kind": (keys(tokenizer__ggml__model="bert"), "tokenizer.ggml.model is 'bert'"),
    "no-pre": (keys(tokenizer__ggml__pre=None), "tokenizer.ggml.pre is None, expected one of gpt-2"),
    "default-pre": (keys(tokenizer__ggml__pre="default"), "tokenizer.ggml.pre is 'default'"),
    "another-pre": (keys(tokenizer__ggml__pre="qwen2"), "tokenizer.ggml.pre is 'qwen2'"),
    "unknown-key": (keys(tokenizer__ggml__normalizer__lowercase=True), "normalizer.lowercase is not a key"),
    "whitespace": (keys(tokenizer__ggml__remove_extra_whitespaces=True), "remove_extra_whitespaces is True"),
    "space-prefix": (keys(tokenizer__ggml__add_space_prefix=True), "add_space_prefix is true"),
    "flag": (keys(tokenizer__ggml__add_bos_token=1), "add_bos_token is 1, expected true or false"),
    "template": (keys(tokenizer__chat_template=["a"]), "chat_template is not a text"),
    "no-tokens": (keys(tokenizer__ggml__tokens=None), "tokenizer.ggml.tokens is not a list of str"),
    "types-short": (items("token_type", lambda t: t.pop()), "tokenizer.ggml.token_type has"),
    "no-types": (keys(tokenizer__ggml__token_type=None), "token_type is not a list of int"),
    "twice": (items("tokens", lambda t: t.__setitem__(7, t[6])), "twice, as 6 and 7"),
    "merge-form": (items("merges", lambda m: m.append("abc")), "merges holds 'abc', expected two tokens"),
    "merge-three": (items("merges", lambda m: m.append("a b c")), "merges holds 'a b c'"),
    "merge-unknown": (items("merges", lambda m: m.append("q zzz")), "zzz"),
    "bos-outside": (keys(tokenizer__ggml__bos_token_id=100000), "bos_token_id is 100000"),
    "eot-outside": (keys(tokenizer__ggml__eot_token_id=100000), "eot_token_id is 100000"),
    "no-bos": (
        keys(tokenizer__ggml__bos_token_id=None, tokenizer__ggml__add_bos_token=True),
        "bos_token_id is not given",
    ),
    "scores-missing": (
        both(to_sentencepiece, keys(tokenizer__ggml__scores=None)),
        "tokenizer.ggml.scores is not a list of float",
    ),
    "scores-equal": (
        both(to_sentencepiece, items("scores", lambda s: s.__setitem__(slice(None), [-1000.0] * len(s)))),
        "order of the merges is lost",
    ),
    "spaced-token": (
        both(to_sentencepiece, items("tokens", lambda t: t.__setitem__(-1, "▁▁tool"))),
        "'▁▁tool' holds a SentencePiece space",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINT_REFUSALS)
def test_checkpoints_are_refused_by_name(tmp_path: Path, name: str) -> None:
    change, message = CHECKPOINT_REFUSALS[name]
    _assert_refused(tmp_path / "model.gguf", change, CheckpointError, message)


@pytest.mark.parametrize("name", TOKENIZER_REFUSALS)
def test_tokenizers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    change, message = TOKENIZER_REFUSALS[name]
    _assert_refused(tmp_path / "model.gguf", change, TokenizerError, message)


def _assert_refused(path: Path, change: Change, error: type[EdgellamaError], message: str) -> None:
    conversion = convert(source(tiny_config()))
    change(conversion)
    conversion.write(path)
    with pytest.raises(error) as raised:
        open_checkpoint(path)
    assert message in raised.value.message
    assert raised.value.remedy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file: it starts with b''"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer and not the model"),
        (b"GGUF\x01\0\0\0" + bytes(16), "GGUF version 1, expected 2 or 3"),
        (b"GGUF\x04\0\0\0" + bytes(16), "GGUF version 4, expected 2 or 3"),
        (b"GGUF\x03\0\0\0", "damaged or truncated"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path)
    assert message in raised.value.message


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = convert(source(tiny_config(num_hidden_layers=1))).write(tmp_path / "whole.gguf").read_bytes()
    truncated = tmp_path / "cut.gguf"
    for size in [*range(4, len(content), len(content) // 150), len(content) - 4]:
        truncated.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="damaged or truncated"):
            open_checkpoint(truncated)


def test_a_damaged_header_is_refused_or_harmless(tmp_path: Path) -> None:
    """A damaged header byte raises only our own errors, and never causes an endless loop."""
    path = convert(source(tiny_config(num_hidden_layers=1))).write(tmp_path / "model.gguf")
    content, rng, refused = path.read_bytes(), random.Random(0), 0
    end = content.index(b"token_embd.weight") + 1000
    for _ in range(300):
        at = rng.randrange(4, end)
        path.write_bytes(content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :])
        try:
            open_checkpoint(path)
        except EdgellamaError:
            refused += 1
    assert refused > 50
