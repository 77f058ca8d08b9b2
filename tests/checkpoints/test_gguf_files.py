"""GGUF files as they lie about: in parts, under other names, of other types, and of types that are gone."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Ggml

from edgellama.bundle.record import checkpoint_files
from edgellama.checkpoints import open_checkpoint
from edgellama.commands.inspect import inspect
from edgellama.errors import CheckpointError
from tests.helpers.gguf_models import (
    Conversion,
    byte_level_metadata,
    convert,
    source,
    tiny_config,
    trained_bpe,
)


def conversion(**metadata: Any) -> Conversion:
    model = convert(source(tiny_config(num_hidden_layers=1)))
    model.metadata |= {key.replace("__", "."): value for key, value in metadata.items()}
    return model


def write_parts(directory: Path, count: int, name: str = "model") -> list[Path]:
    """One model in parts, as llama-gguf-split writes them: metadata in the first, tensors in turn."""
    whole = conversion()
    paths = []
    for number in range(count):
        part = Conversion(
            {
                **(whole.metadata if number == 0 else {}),
                "split.no": number,
                "split.count": count,
                "split.tensors.count": len(whole.tensors),
            },
            dict(list(whole.tensors.items())[number::count]),
            whole.types,
        )
        paths.append(part.write(directory / f"{name}-{number + 1:05d}-of-{count:05d}.gguf"))
    return paths


def test_any_part_opens_the_whole_model(tmp_path: Path) -> None:
    whole = open_checkpoint(conversion().write(tmp_path / "whole.gguf"))
    parts = write_parts(tmp_path, 3)
    for path in (parts[0], parts[2]):
        checkpoint = open_checkpoint(path)
        assert checkpoint.files == tuple(parts)
        assert checkpoint.config == whole.config
        for name in whole.infos:
            assert checkpoint.tensor(name).equal(whole.tensor(name)), name
    assert checkpoint_files(parts[0]) == checkpoint_files(parts[2])
    assert len(checkpoint_files(parts[0])) == 3


def test_parts_that_are_missing_renamed_or_mixed_are_refused(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, 3)
    alone = tmp_path / "alone.gguf"
    shutil.copy(parts[0], alone)
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        open_checkpoint(alone)
    kept = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(CheckpointError, match="1 of 3 parts are missing beside it: model-00002-of-00003"):
        open_checkpoint(parts[0])
    shutil.copy(parts[2], parts[1])
    with pytest.raises(CheckpointError, match="its metadata says part 2 of 3"):
        open_checkpoint(parts[0])
    parts[1].write_bytes(kept)
    open_checkpoint(parts[0])


def test_a_file_is_gguf_by_its_first_bytes(tmp_path: Path) -> None:
    """Ollama stores models as blobs without an ending."""
    path = conversion().write(tmp_path / "model.gguf")
    blob = tmp_path / f"sha256-{'843d506c' * 8}"
    shutil.copy(path, blob)
    assert open_checkpoint(blob).infos == open_checkpoint(path).infos
    assert inspect(blob)["kind"] == "checkpoint"
    assert checkpoint_files(blob) == checkpoint_files(path)


@pytest.mark.parametrize(
    ("name", "content", "message", "remedy"),
    [
        ("model", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer", "git lfs pull"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}", "one file of a checkpoint", "Give the directory"),
        ("config.json", b"{}", "one file of a checkpoint", "Give the directory"),
        ("notes.txt", b"hello", "not a checkpoint", "a GGUF file"),
    ],
)
def test_other_single_files_lead_on(
    tmp_path: Path, name: str, content: bytes, message: str, remedy: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(tmp_path / name)
    assert remedy in raised.value.remedy


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "MXFP4"])
def test_mixes_of_quantized_types_open(tmp_path: Path, kind: str) -> None:
    model = conversion()
    block, size = GGML_QUANT_SIZES[Ggml[kind]]
    rows, columns = model.tensors["blk.0.ffn_gate.weight"].shape
    model.tensors["blk.0.ffn_gate.weight"] = np.zeros((rows, columns // block * size), np.uint8)
    model.types["blk.0.ffn_gate.weight"] = Ggml[kind]
    checkpoint = open_checkpoint(model.write(tmp_path / "model.gguf"))
    assert checkpoint.infos["model.layers.0.mlp.gate_proj.weight"].dtype == kind
    assert checkpoint.tensor("model.layers.0.mlp.gate_proj.weight").shape == (rows, columns)
    assert any(f"1 {kind}" in note for note in checkpoint.notes)


def retyped(path: Path, number: int) -> Path:
    """Changes the type number of one tensor in the file's header."""
    content = bytearray(path.read_bytes())
    name = b"blk.0.ffn_up.weight"
    at = content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    struct.pack_into("<I", content, at + 4 + 2 * 8, number)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("number", "message", "remedy"),
    [
        (31, "type Q4_0_4_4, which ggml has removed; the file is sound", "Q4_0 file of the same model"),
        (33, "type Q4_0_8_8", "Q4_0 file"),
        (36, "type IQ4_NL_4_4", "F16"),
        (4, "type Q4_2", "F16"),
        (200, "type number 200, which the installed package gguf does not know", "newer"),
        (70000, "damaged or truncated", "Download"),
    ],
)
def test_types_that_are_gone_or_new_are_named(tmp_path: Path, number: int, message: str, remedy: str) -> None:
    path = retyped(conversion().write(tmp_path / "model.gguf"), number)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path)
    assert message in raised.value.message and remedy in raised.value.remedy


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, ("<|end|>",)),
        ({"tokenizer.ggml.eot_token_id": "<|begin|>"}, ("<|end|>", "<|begin|>")),
        (
            {
                "tokenizer.chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|begin|>{% endfor %}"
            },
            ("<|end|>", "<|begin|>"),
        ),
    ],
)
def test_stop_tokens_of_a_gguf_file(tmp_path: Path, keys: dict[str, str], expected: tuple[str, ...]) -> None:
    model = conversion()
    tokens = model.metadata["tokenizer.ggml.tokens"]
    for key, value in keys.items():
        model.metadata[key] = tokens.index(value) if key.endswith("_id") else value
    checkpoint = open_checkpoint(model.write(tmp_path / "model.gguf"))
    assert tuple(stop.text for stop in checkpoint.stop_tokens) == expected


def test_a_turn_s_end_without_its_key_is_found_by_its_name(tmp_path: Path) -> None:
    """As llama.cpp does for a file without `eot_token_id`. An ordinary token of that text does not count."""
    model = conversion()
    metadata = byte_level_metadata(trained_bpe(), "smollm")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokens[tokens.index("<|begin|>")] = "<|eot_id|>"
    model.metadata |= metadata
    checkpoint = open_checkpoint(model.write(tmp_path / "model.gguf"))
    assert [stop.text for stop in checkpoint.stop_tokens] == ["<|end|>", "<|eot_id|>"]
    types[tokens.index("<|eot_id|>")] = 4
    checkpoint = open_checkpoint(model.write(tmp_path / "other.gguf"))
    assert [stop.text for stop in checkpoint.stop_tokens] == ["<|end|>"]
