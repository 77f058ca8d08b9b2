"""Weights of Hugging Face directories as trainings leave them: pickles, other names, leftovers, adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgellama.bundle.record import checkpoint_files
from edgellama.checkpoints import open_checkpoint
from edgellama.errors import CheckpointError
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import inverse_frequencies
from tests.helpers.odd_checkpoints import write_checkpoint

Weights = dict[str, Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def take_weights(directory: Path) -> Weights:
    """Loads and removes the weight file."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    return {name: tensor.clone() for name, tensor in weights.items()}


def halves(weights: Weights) -> tuple[Weights, Weights]:
    items = list(weights.items())
    return dict(items[::2]), dict(items[1::2])


def pickle_file(directory: Path, weights: Weights) -> None:
    torch.save(weights, directory / "pytorch_model.bin")


def old_pickle(directory: Path, weights: Weights) -> None:
    torch.save(weights, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def nested_pickle(directory: Path, weights: Weights) -> None:
    torch.save({"epoch": 3, "state_dict": weights}, directory / "pytorch_model.bin")


def pickles_with_index(directory: Path, weights: Weights) -> None:
    index: dict[str, str] = {}
    for i, half in enumerate(halves(weights), start=1):
        name = f"pytorch_model-0000{i}-of-00002.bin"
        torch.save(half, directory / name)
        index |= dict.fromkeys(half, name)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


def torchtune(directory: Path, weights: Weights) -> None:
    """The base model's index was copied, and the shards have other names."""
    for i, half in enumerate(halves(weights), start=1):
        save_file(half, directory / f"ft-model-0000{i}-of-00002.safetensors")
    index = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def old_torchtune(directory: Path, weights: Weights) -> None:
    for i, half in enumerate(halves(weights), start=1):
        torch.save(half, directory / f"hf_model_000{i}_0.pt")
    torch.save({"seed": 1}, directory / "recipe_state.pt")


def lone_file(directory: Path, weights: Weights) -> None:
    save_file(weights, directory / "my-model.safetensors")


def wrapped(directory: Path, weights: Weights) -> None:
    save_file({f"module.{name}": w for name, w in weights.items()}, directory / "model.safetensors")


def with_state(directory: Path, weights: Weights) -> None:
    pickle_file(directory, weights)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
        torch.save({"step": 1}, directory / name)


def with_buffers(directory: Path, weights: Weights) -> None:
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": 10000.0 ** -(torch.arange(8) / 8),
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(4, 16),
        "model.position_ids": torch.arange(4),
    }
    save_file({**weights, **buffers}, directory / "model.safetensors")


LAYOUTS: list[Callable[[Path, Weights], None]] = [
    pickle_file, old_pickle, nested_pickle, pickles_with_index, torchtune, old_torchtune, lone_file, wrapped,
    with_state, with_buffers,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_same_weights(layout: Callable[[Path, Weights], None], tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    weights = take_weights(directory)
    layout(directory, weights)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.infos.keys() == weights.keys()
    for name, weight in weights.items():
        assert checkpoint.tensor(name).equal(weight.float()), name
        assert checkpoint.infos[name].dtype == "BF16"
    assert {file.name for file in checkpoint.files} <= checkpoint_files(directory).keys()


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({**take_weights(directory), "x": Evil()}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a file of plain tensors"):
        open_checkpoint(directory)
    assert not (tmp_path / "ran").exists()


def test_two_sets_of_numbered_files_are_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    weights = take_weights(directory)
    for stem in ("model", "ft-model"):
        for i, half in enumerate(halves(weights), start=1):
            save_file(half, directory / f"{stem}-0000{i}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="not one complete numbered set"):
        open_checkpoint(directory)


def test_a_set_with_a_gap_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    save_file(take_weights(directory), directory / "ft-model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="not one complete numbered set"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "file", ["adapter_config.json", "adapter_model.safetensors", "adapters.safetensors", "adapter_0.pt"]
)
def test_an_adapter_beside_a_model_is_refused_with_both_ways_out(file: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    (directory / file).write_text("{}")
    with pytest.raises(CheckpointError, match="a whole model and an adapter") as raised:
        open_checkpoint(directory)
    assert "merged already, remove" in raised.value.remedy and "with --adapter" in raised.value.remedy


def test_an_adapter_alone_is_named(tmp_path: Path) -> None:
    with_config = write_checkpoint(tmp_path / "model")
    take_weights(with_config)
    (with_config / "adapter_model.bin").write_bytes(b"")
    without_config = tmp_path / "lora"
    without_config.mkdir()
    (without_config / "adapter_config.json").write_text("{}")
    for directory in (with_config, without_config):
        with pytest.raises(CheckpointError, match=r"an adapter \(LoRA\) and not a whole model"):
            open_checkpoint(directory)


TIED = {"tie_word_embeddings": True}


def test_a_tied_model_that_stores_only_the_head(tmp_path: Path) -> None:
    directory = write_checkpoint(
        tmp_path / "model",
        config=TIED,
        change=lambda w: {HEAD if n == EMBEDDING else n: t for n, t in w.items()},
    )
    checkpoint = open_checkpoint(directory)
    assert EMBEDDING in checkpoint.infos and HEAD not in checkpoint.infos
    assert checkpoint.tensor(EMBEDDING).equal(load_file(directory / "model.safetensors")[HEAD].float())
    assert any("only lm_head.weight is stored" in note for note in checkpoint.notes)


def test_an_index_may_list_the_head_that_is_tied(tmp_path: Path) -> None:
    for tied in (True, False):
        directory = write_checkpoint(tmp_path / f"tied {tied}", config={"tie_word_embeddings": tied})
        weights = take_weights(directory)
        save_file(
            {n: w for n, w in weights.items() if n != HEAD}, directory / "model-00001-of-00001.safetensors"
        )
        index = dict.fromkeys([*weights, HEAD], "model-00001-of-00001.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        if tied:
            assert any("the index lists lm_head" in note for note in open_checkpoint(directory).notes)
        else:
            with pytest.raises(CheckpointError, match=r"lm_head.weight is not in model-00001"):
                open_checkpoint(directory)


def test_a_leftover_quantization_config_beside_full_weights_is_a_note(tmp_path: Path) -> None:
    leftover = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    notes = open_checkpoint(write_checkpoint(tmp_path / "model", config=leftover)).notes
    assert notes == (
        "config.json: quantization_config ('bitsandbytes') is ignored: the weights are of full precision",
    )


def packed(weights: Weights) -> Weights:
    """q_proj as GPTQ stores it."""
    del weights["model.layers.0.self_attn.q_proj.weight"]
    return weights | {"model.layers.0.self_attn.q_proj.scales": torch.ones(2, 64, dtype=torch.float16)}


def halved(weights: Weights) -> Weights:
    """q_proj with two codes in a value, under its own name."""
    name = "model.layers.0.self_attn.q_proj.weight"
    return weights | {name: weights[name][:, ::2].contiguous()}


@pytest.mark.parametrize("change", [packed, halved])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_weights_without_known_settings_are_refused(
    key: str, change: Callable[[Weights], Weights], tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path / "model", change=change)
    config = json.loads((directory / "config.json").read_text()) | {key: {"quant_method": "gptq"}}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"quantization_config\.bits is None, expected 4 or 8"
    ) as raised:
        open_checkpoint(directory)
    assert "remove" in raised.value.remedy


def test_stored_frequencies_of_another_model_are_noted(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    directory = write_checkpoint(tmp_path / "model")
    weights, config = take_weights(directory), open_config(directory)
    for factor in (1.0, 4.0):
        buffer = {name: inverse_frequencies(config) / factor}
        save_file(weights | buffer, directory / "model.safetensors")
        noted = any("RoPE frequencies" in note for note in open_checkpoint(directory).notes)
        assert noted == (factor != 1.0)


def open_config(directory: Path) -> Any:

    return LlamaConfig.from_hf(json.loads((directory / "config.json").read_text()))


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "pytorch_model.bin"]
)
def test_lfs_pointers_are_named(file: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    if file == "pytorch_model.bin":
        take_weights(directory)
    (directory / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(Exception, match="a Git LFS pointer"):
        open_checkpoint(directory)
