"""Meta's checkpoints: weights against their Hugging Face source model, and configs read from params.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgellama.checkpoints import open_checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.model.config import RopeScaling
from tests.helpers.meta_models import PARAMS, config_of, meta_weights, ranks, shard, source_model, write


def assert_same_logits(path: Path, model: transformers.LlamaForCausalLM) -> None:
    """Compares the Meta checkpoint at `path` with its source model on 100 tokens."""
    checkpoint = open_checkpoint(path)
    tokens = torch.randint(0, 900, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = load_llama(checkpoint, 128)(tokens)
        theirs = model(tokens).logits
    assert theirs.std() > 0.5, "logits too flat to tell anything"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_one_file_gives_the_logits_of_the_source(tmp_path: Path) -> None:
    model = source_model()
    assert_same_logits(write(tmp_path, meta_weights(model)), model)


@pytest.mark.parametrize("embedding", [0, 1], ids=["Llama 3", "Llama 2"])
def test_two_shards_give_the_logits_of_the_source(embedding: int, tmp_path: Path) -> None:
    model = source_model()
    weights = meta_weights(model)
    write(tmp_path, *(shard(weights, i, 2, embedding=embedding) for i in range(2)))
    assert_same_logits(tmp_path, model)
    checkpoint = open_checkpoint(tmp_path)
    assert [file.name for file in checkpoint.files] == ["consolidated.00.pth", "consolidated.01.pth"]
    assert checkpoint.infos["model.layers.0.mlp.down_proj.weight"].shape == (64, 224)
    assert checkpoint.infos["model.layers.0.mlp.down_proj.weight"].nbytes == 64 * 224 * 4


@pytest.mark.parametrize("shards", [1, 2])
def test_an_output_equal_to_the_embedding_is_tied(shards: int, tmp_path: Path) -> None:
    model = source_model(tie_word_embeddings=True)
    weights = meta_weights(model)
    assert torch.equal(weights["output.weight"], weights["tok_embeddings.weight"])
    write(tmp_path, *(shard(weights, i, shards, embedding=1) for i in range(shards)))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.tie_word_embeddings
    assert "lm_head.weight" not in checkpoint.infos
    assert_same_logits(tmp_path, model)


def test_an_output_that_differs_in_one_weight_is_not_tied(tmp_path: Path) -> None:
    weights = meta_weights(source_model(tie_word_embeddings=True))
    weights["output.weight"][-1, -1] += 1
    assert not open_checkpoint(write(tmp_path, weights)).config.tie_word_embeddings


def test_scaled_rope_of_llama_3_1(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = source_model(rope_parameters=scaling)
    write(tmp_path, meta_weights(model), params=PARAMS | {"use_scaled_rope": True, "rope_scale_factor": 8})
    assert open_checkpoint(tmp_path).config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert_same_logits(tmp_path, model)


def test_bfloat16_stays_in_the_mapped_file(tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in meta_weights(source_model()).items()}
    checkpoint = open_checkpoint(write(tmp_path, weights))
    name = "model.embed_tokens.weight"
    assert checkpoint.infos[name].dtype == "BF16"
    assert checkpoint.infos[name].nbytes == 2 * weights["tok_embeddings.weight"].numel()
    embedding = checkpoint.read(name)
    assert embedding.dtype == torch.bfloat16
    assert embedding.data_ptr() == checkpoint.read(name).data_ptr(), "copied, not mapped"
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(checkpoint.files[0]) in maps.read_text()
    torch.testing.assert_close(embedding, weights["tok_embeddings.weight"], atol=0, rtol=0)
    assert checkpoint.license is None


def test_special_tokens_come_from_the_tokenizer(tmp_path: Path) -> None:
    config = open_checkpoint(write(tmp_path, meta_weights(source_model()))).config
    first = len(ranks())
    assert config.bos_token_id == first
    assert config.eos_token_ids == (first + 1, first + 8, first + 9)


@pytest.mark.parametrize(
    ("params", "scale", "context", "inner"),
    [
        # Released params.json, from the model cards. Hugging Face's config.json has the expected numbers.
        (
            {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": ..., "multiple_of": 256}
            | {"ffn_dim_multiplier": ..., "rope_theta": ...},
            None,
            4096,
            11008,
        ),
        (
            {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 1024}
            | {"vocab_size": 128256},
            None,
            8192,
            14336,
        ),
        (
            {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 1024}
            | {"vocab_size": 128256, "use_scaled_rope": True},
            8.0,
            131072,
            14336,
        ),
        (
            {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 256}
            | {"vocab_size": 128256, "use_scaled_rope": True, "ffn_dim_multiplier": 1.5},
            32.0,
            131072,
            8192,
        ),
        (
            {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "multiple_of": 256}
            | {"vocab_size": 128256, "use_scaled_rope": True, "ffn_dim_multiplier": 1.0},
            32.0,
            131072,
            8192,
        ),
    ],
    ids=["Llama 2 7B", "Llama 3 8B", "Llama 3.1 8B", "Llama 3.2 1B", "Llama 3.2 3B"],
)
def test_released_params(params: dict[str, Any], scale: float | None, context: int, inner: int) -> None:
    config = config_of(max_seq_len=..., **params)
    assert (config.rope_scaling.factor if config.rope_scaling else None) == scale
    assert config.max_position_embeddings == context
    assert config.intermediate_size == inner
    assert config.vocab_size == (128256 if "vocab_size" in params else 32000)
    assert config.num_key_value_heads == (8 if params["n_kv_heads"] == 8 else 32)
