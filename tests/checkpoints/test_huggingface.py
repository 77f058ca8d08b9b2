"""open_hf and LlamaConfig.from_hf: reading of Hugging Face checkpoints, and refusals by name."""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgellama.checkpoints import open_checkpoint
from edgellama.checkpoints.huggingface import open_hf
from edgellama.checkpoints.weights import load_llama
from edgellama.errors import CheckpointError, EdgellamaError, TokenizerError
from edgellama.model.config import LlamaConfig, RopeScaling
from tests.helpers.paths import TINY

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
EMBEDDING = "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


def random_weights(config: Mapping[str, Any] = CONFIG) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = LlamaConfig.from_hf(config).tensor_shapes()
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    """Directory of a small valid model with a single weight file."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    save_file(random_weights(), tmp_path / "model.safetensors")
    return tmp_path


def set_config(directory: Path, **changes: Any) -> None:
    """Writes config.json with these changes of CONFIG."""
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def set_weights(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Applies `change` to the weights of the single file."""
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def shard(directory: Path, **changes: str) -> None:
    """Splits the weights over two files with an index. `changes` overrides files of tensors in the index."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for half, name in enumerate(("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
        part = dict(list(weights.items())[half::2])
        save_file(part, directory / name)
        index |= dict.fromkeys(part, name)
    text = json.dumps({"metadata": {}, "weight_map": {**index, **changes}})
    (directory / INDEX).write_text(text)


# Reading


def test_one_file(model_directory: Path) -> None:
    weights = random_weights()
    checkpoint = open_checkpoint(model_directory)
    assert checkpoint.format == "safetensors"
    assert checkpoint.files == (model_directory / "model.safetensors",)
    assert checkpoint.notes == ()
    assert checkpoint.license is None
    assert checkpoint.infos.keys() == weights.keys()
    assert checkpoint.infos[EMBEDDING].nbytes == 512 * 16 * 4
    for name, weight in weights.items():
        assert torch.equal(checkpoint.tensor(name), weight)


def test_shards_give_the_same_checkpoint(model_directory: Path) -> None:
    unsharded = open_checkpoint(model_directory)
    expected = {name: unsharded.tensor(name).clone() for name in unsharded.infos}
    shard(model_directory)
    sharded = open_checkpoint(model_directory)
    assert [file.name for file in sharded.files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sharded.infos == unsharded.infos
    for name, weight in expected.items():
        assert torch.equal(sharded.tensor(name), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_exactly(model_directory: Path, dtype: torch.dtype) -> None:
    set_weights(model_directory, lambda weights: weights.update({n: w.to(dtype) for n, w in weights.items()}))
    checkpoint = open_checkpoint(model_directory)
    for name, weight in random_weights().items():
        assert checkpoint.read(name).dtype == dtype
        assert torch.equal(checkpoint.tensor(name), weight.to(dtype).float())


def test_float32_weights_are_views_of_the_mapped_file(model_directory: Path) -> None:
    """The mapping ends with the last view, so a checkpoint that was read does not stay in memory."""
    checkpoint = open_checkpoint(model_directory)
    weight = checkpoint.tensor(EMBEDDING)
    if sys.platform == "linux":
        assert any(
            start <= weight.data_ptr() < end for start, end in mapped(model_directory / "model.safetensors")
        )
        del weight
        assert mapped(model_directory / "model.safetensors") == []


def mapped(file: Path) -> list[tuple[int, int]]:
    """Address ranges of the file in this process's memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(str(file))]
    return [(int(start, 16), int(end, 16)) for start, end in spans]


def test_a_large_file_is_not_read_to_read_one_tensor(model_directory: Path) -> None:
    """The sparse file has a hole of 2 GiB. Opening it or reading the other tensor never touches the hole."""
    hole = 2**31
    header = json.dumps(
        {
            "model.layers.0.huge": {"dtype": "F32", "shape": [hole // 4], "data_offsets": [0, hole]},
            "model.norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [hole, hole + 64]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with (model_directory / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.seek(hole, 1)
        stream.write(struct.pack("<16f", *range(16)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoint = open_hf(model_directory)
    assert checkpoint.tensor("model.norm.weight").tolist() == list(range(16))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < (256 << 20 if sys.platform == "darwin" else 256 << 10)


def test_rotary_buffers_of_old_checkpoints_are_ignored(model_directory: Path) -> None:
    buffer = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    set_weights(model_directory, lambda weights: weights.update(buffer))
    assert open_checkpoint(model_directory).infos.keys() == random_weights().keys()
    shard(model_directory)
    assert "inv_freq" in (model_directory / INDEX).read_text()
    assert open_checkpoint(model_directory).infos.keys() == random_weights().keys()


def test_stored_head_equal_to_its_embedding_is_dropped_with_a_note(model_directory: Path) -> None:
    set_weights(
        model_directory, lambda weights: weights.update({"lm_head.weight": weights[EMBEDDING].clone()})
    )
    checkpoint = open_checkpoint(model_directory)
    assert "lm_head.weight" not in checkpoint.infos
    assert "lm_head.weight" in checkpoint.notes[0]


def test_names_without_prefix_when_tied(model_directory: Path) -> None:
    weights = random_weights()
    save_file(
        {name.removeprefix("model."): w for name, w in weights.items()}, model_directory / "model.safetensors"
    )
    checkpoint = open_checkpoint(model_directory)
    assert torch.equal(checkpoint.tensor(EMBEDDING), weights[EMBEDDING])


def test_unknown_config_keys_are_noted(model_directory: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "finetuned": True}
    set_config(model_directory, attention_dropout=0.1, pretraining_tp=2, mystery_gate=3, rope_scaling=rope)
    (note,) = open_checkpoint(model_directory).notes
    assert "mystery_gate" in note
    assert "rope_scaling.finetuned" in note
    assert "attention_dropout" not in note


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model", "apache-2.0"),
        ('---\r\nlicense: "llama3.2"  # see LICENSE\r\n---\r\n', "llama3.2"),
        ("---\nlicense: other\nlicense_name: my-license\n---\n", "my-license"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("# Model\nlicense: mit\n---\n", None),
        ("", None),
    ],
)
def test_license_of_the_model_card(model_directory: Path, card: str, expected: str | None) -> None:
    (model_directory / "README.md").write_bytes(card.encode())
    assert open_checkpoint(model_directory).license == expected


# Refusals: (damage to the model directory, words that the message must hold)

Damage = Callable[[Path], Any]


def _config(**changes: Any) -> Damage:
    return lambda d: set_config(d, **changes)


def _write(name: str, text: str | bytes) -> Damage:
    return lambda d: (d / name).write_bytes(text.encode() if isinstance(text, str) else text)


def _weights(change: Callable[[dict[str, Tensor]], Any]) -> Damage:
    return lambda d: set_weights(d, change)


def _rename(new: str | None) -> Damage:
    old = "model.safetensors"
    return lambda d: (d / old).rename(d / new) if new else (d / old).unlink()


def _cut(size: int) -> Damage:
    file = "model.safetensors"
    return lambda d: (d / file).write_bytes((d / file).read_bytes()[:size])


def _then(*steps: Damage) -> Damage:
    return lambda d: [step(d) for step in steps]


def _copy_tensor_to_the_other_shard(directory: Path) -> None:
    shard(directory)
    first, second = (directory / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file(load_file(first) | load_file(second), second)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

REFUSED: dict[str, tuple[Damage, tuple[str, ...]]] = {
    # config.json
    "config is not JSON": (_write("config.json", "{"), ("config.json", "JSON")),
    "config is not UTF-8": (_write("config.json", b"\xff\xfe{}"), ("config.json", "JSON")),
    "config is a list": (_write("config.json", "[1]"), ("config.json", "list", "object")),
    "config is nested without end": (_write("config.json", "[" * 100_000), ("config.json",)),
    "generation config": (_write("generation_config.json", "nope"), ("generation_config.json", "JSON")),
    "generation eos": (
        _write("generation_config.json", '{"eos_token_id": "<eos>"}'),
        ("generation_config.json", "<eos>"),
    ),
    "model_type": (_config(model_type="mistral"), ("model_type", "'mistral'", "'llama'")),
    "no model_type": (_write("config.json", "{}"), ("model_type", "None", "'llama'")),
    "another head": (
        _config(architectures=["LlamaForQuestionAnswering"]),
        ("LlamaForQuestionAnswering", "LlamaForCausalLM"),
    ),
    "own code": (_config(auto_map={"AutoModelForCausalLM": "modeling.X"}), ("auto_map", "modeling.X")),
    "sliding window": (_config(sliding_window=4096), ("sliding_window", "4096")),
    "layer types": (_config(layer_types=["sliding_attention"]), ("layer_types", "sliding_attention")),
    "experts": (_config(num_local_experts=8), ("num_local_experts", "8")),
    "activation": (_config(hidden_act="gelu"), ("hidden_act", "'gelu'", "'silu'")),
    "rope type": (_config(rope_scaling={"type": "yarn", "factor": 2.0}), ("rope_type", "'yarn'", "llama3")),
    "new rope type": (_config(rope_parameters={"rope_type": "longrope"}), ("rope_type", "'longrope'")),
    "rope per layer": (
        _config(rope_parameters={"full_attention": {"rope_theta": 1e6}}),
        ("rope_parameters", "full_attention"),
    ),
    "two thetas": (
        _config(rope_theta=1e4, rope_parameters={"rope_theta": 5e5}),
        ("rope_theta", "10000.0", "500000.0"),
    ),
    "two rope types": (
        _config(rope_parameters={"rope_type": "default"}, rope_scaling={"type": "linear", "factor": 2.0}),
        ("rope_type", "'default'", "'linear'"),
    ),
    "linear without factor": (_config(rope_scaling={"type": "linear"}), ("factor", "None")),
    "factor without type": (_config(rope_scaling={"factor": 2.0}), ("factor", "2.0", "rope_type")),
    "llama3 without length": (_config(rope_scaling=LLAMA3), ("original_max_position_embeddings", "None")),
    "partial rotary": (_config(partial_rotary_factor=0.5), ("partial_rotary_factor", "0.5")),
    "partial rotary inside": (
        _config(rope_parameters={"partial_rotary_factor": 0.5}),
        ("partial_rotary_factor", "0.5"),
    ),
    "missing size": (_config(hidden_size=None), ("hidden_size", "None")),
    "size as text": (_config(vocab_size="512"), ("vocab_size", "'512'")),
    "absurd depth": (_config(num_hidden_layers=2**30), ("num_hidden_layers", str(2**30))),
    "heads": (_config(num_attention_heads=4, num_key_value_heads=3), ("num_key_value_heads", "3", "4")),
    "odd head_dim": (_config(head_dim=7), ("head_dim", "7")),
    "eps": (_config(rms_norm_eps=0), ("rms_norm_eps", "0")),
    "tie as text": (_config(tie_word_embeddings="false"), ("tie_word_embeddings", "'false'")),
    "eos": (_config(eos_token_id=[2, -1]), ("eos_token_id", "-1")),
    # Choice of files
    "no weights": (_rename(None), ("no weights", "model.safetensors")),
    "pickle": (_rename("pytorch_model.bin"), ("pytorch_model.bin", "safetensors", "save_pretrained")),
    "adapter": (_rename("adapter_model.safetensors"), ("adapter", "--adapter")),
    "one of several": (_rename("model-00001-of-00002.safetensors"), ("model-00001-of-00002", INDEX)),
    "git lfs": (
        _write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("Git LFS", "git lfs pull"),
    ),
    "index is not JSON": (_write(INDEX, "{"), (INDEX, "JSON")),
    "index without map": (_write(INDEX, "{}"), (INDEX, "weight_map")),
    "index leaves the directory": (
        lambda d: shard(d, **{EMBEDDING: "../model.safetensors"}),
        (INDEX, "'../model.safetensors'"),
    ),
    "index names no file": (lambda d: shard(d, **{EMBEDDING: ".."}), (INDEX, "'..'")),
    "shard missing": (
        _then(shard, lambda d: (d / "model-00002-of-00002.safetensors").unlink()),
        ("model-00002-of-00002.safetensors", "1 of 2"),
    ),
    "index names a tensor that is nowhere": (
        lambda d: shard(d, **{"model.extra": "model-00001-of-00002.safetensors"}),
        (INDEX, "model.extra", "model-00001-of-00002.safetensors"),
    ),
    "index names the wrong shard": (
        lambda d: shard(d, **{"model.norm.weight": "model-00001-of-00002.safetensors"}),
        (INDEX, "model.norm.weight", "model-00001-of-00002.safetensors"),
    ),
    "tensor in two shards": (_copy_tensor_to_the_other_shard, ("is also in model-00001-of-00002",)),
    "index beside a whole file": (
        _then(shard, lambda d: save_file(random_weights(), d / "model.safetensors")),
        ("model.safetensors", INDEX),
    ),
    # Contents of the files
    "empty": (_cut(0), ("model.safetensors", "damaged")),
    "cut in the header": (_cut(100), ("model.safetensors", "damaged")),
    "cut in the data": (_cut(20_000), ("model.safetensors", "damaged")),
    "int8": (_weights(lambda w: w.update({EMBEDDING: w[EMBEDDING].char()})), (EMBEDDING, "I8", "F32")),
    "uint8": (_weights(lambda w: w.update({EMBEDDING: w[EMBEDDING].byte()})), (EMBEDDING, "U8")),
    "fp8": (_weights(lambda w: w.update({EMBEDDING: w[EMBEDDING].to(torch.float8_e4m3fn)})), ("F8_E4M3",)),
    "float64": (_weights(lambda w: w.update({EMBEDDING: w[EMBEDDING].double()})), (EMBEDDING, "F64")),
    "missing tensor": (_weights(lambda w: w.pop("model.norm.weight")), ("missing", "model.norm.weight")),
    "missing head": (_config(tie_word_embeddings=False), ("missing", "lm_head.weight")),
    "extra tensor": (
        _weights(lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
        ("not expected", "q_norm"),
    ),
    "bias that the config does not have": (
        _weights(lambda w: w.update({"model.layers.1.mlp.up_proj.bias": torch.ones(24)})),
        ("not expected", "model.layers.1.mlp.up_proj.bias", "mlp_bias"),
    ),
    "misshapen": (
        _weights(lambda w: w.update({"model.norm.weight": torch.ones(17)})),
        ("model.norm.weight", "[17]", "[16]"),
    ),
    "another head than the tied one": (
        _weights(lambda w: w.update({"lm_head.weight": w[EMBEDDING] + 1})),
        ("lm_head.weight", EMBEDDING, "tie_word_embeddings"),
    ),
    "no head and no prefix": (
        _then(
            _config(tie_word_embeddings=False),
            lambda d: save_file(
                {n.removeprefix("model."): w for n, w in random_weights().items()}, d / "model.safetensors"
            ),
        ),
        ("LlamaModel", "lm_head", "tie_word_embeddings"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, model_directory: Path) -> None:
    damage, words = REFUSED[name]
    open_checkpoint(model_directory)
    damage(model_directory)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model_directory)
    assert caught.value.remedy
    for word in words:
        assert word in str(caught.value)


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        open_checkpoint(tmp_path / "nowhere")


def test_tokenizer_of_another_model(model_directory: Path) -> None:
    set_config(model_directory, vocab_size=300)
    set_weights(
        model_directory, lambda weights: weights.update({EMBEDDING: weights[EMBEDDING][:300].clone()})
    )
    with pytest.raises(TokenizerError, match="511"):
        open_checkpoint(model_directory)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(model_directory: Path, value: float) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        weights["model.norm.weight"][3] = value

    set_weights(model_directory, damage)
    checkpoint = open_checkpoint(model_directory)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds 1 values"):
        load_llama(checkpoint, 8)


def test_damaged_headers_never_escape_as_another_exception(model_directory: Path) -> None:
    """Random changes of header bytes leave the file readable or raise our own error."""
    file = model_directory / "model.safetensors"
    original = file.read_bytes()
    length = 8 + struct.unpack("<Q", original[:8])[0]
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(original)
        damaged[rng.randrange(length)] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(model_directory)
            for name in checkpoint.infos:
                checkpoint.read(name)
        except EdgellamaError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "key", [*CONFIG, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "layer_types"]
)
def test_config_values_of_any_kind_never_escape_as_another_exception(key: str) -> None:
    values: list[Any] = [None, True, -1, 0, 7, 10**400, 0.5, float("nan"), float("inf"), "x", [], [None], {}]
    values += [{"rope_type": None}, {"rope_type": []}, {"factor": "x"}, {"type": "linear", "factor": []}]
    for value in values:
        try:
            LlamaConfig.from_hf({**CONFIG, key: value}, {key: value})
        except CheckpointError as error:
            assert key.startswith("rope_") or key in error.message


# Configs from the models' own repositories

SMOLLM2_135M = {
    "_name_or_path": "HuggingFaceTB/SmolLM2-135M",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_GUARD_3_8B = {
    **{key: value for key, value in LLAMA_32_1B.items() if key not in ("head_dim", "tie_word_embeddings")},
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192},
}
TINYLLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
    "use_cache": True,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(
    ("data", "parameters", "scaling"),
    [
        (SMOLLM2_135M, 134_515_008, None),
        (LLAMA_32_1B, 1_235_814_400, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)),
        (LLAMA_GUARD_3_8B, 8_030_261_248, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
        (TINYLLAMA_1B, 1_100_048_384, None),
    ],
    ids=["SmolLM2-135M", "Llama-3.2-1B", "Llama-Guard-3-8B", "TinyLlama-1.1B"],
)
def test_published_configs(
    data: dict[str, Any], parameters: int, scaling: RopeScaling | None, model_directory: Path
) -> None:
    config = LlamaConfig.from_hf(data)
    assert config.parameters == parameters
    assert config.rope_scaling == scaling
    assert config.rope_theta == data["rope_theta"]
    set_config(model_directory, **{key: value for key, value in data.items() if key not in CONFIG})
    assert open_hf(model_directory).notes == ()
