"""Unusable checkpoints in Meta's layout, each refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgellama.checkpoints import open_checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.errors import CheckpointError, TokenizerError
from tests.helpers.meta_models import PARAMS, config_of, meta_weights, shard, source_model, write


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"use_scaled_rope": True}, "the factor is not known(.|\n)*rope_scale_factor"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope must be true or false"),
        ({"max_seq_len": ...}, "does not say the context length(.|\n)*max_seq_len"),
        ({"dim": 65}, "not a multiple of n_heads"),
        ({"dim": None}, "dim must be a positive integer"),
        ({"n_layers": "2"}, "n_layers must be a positive integer"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer"),
        ({"norm_eps": float("nan")}, "norm_eps must be a positive number"),
        ({"ffn_dim_multiplier": 1e308}, "ffn_dim_multiplier must be a positive number up to 1e"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number up to 1e"),
        ({"multiple_of": 0}, "multiple_of must be a positive integer"),
    ],
)
def test_params_that_cannot_be_used_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_of(**params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected an object"),
        ("{}", "dim must be a positive integer"),
        (json.dumps(PARAMS | {"moe_args": {"n": 8}}), "moe_args: not a key of the plain Llama"),
        (json.dumps(PARAMS | {"quantization_args": {"scheme": "int4"}}), "quantization_args"),
    ],
)
def test_a_params_json_that_cannot_be_used_is_refused(params: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, meta_weights(source_model()))
    (tmp_path / "params.json").write_text(params)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


Damage = Callable[[dict[str, Any]], Any]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing tensor": (
        lambda w: w.pop("layers.1.attention.wo.weight"),
        r"missing: model\.layers\.1\.self_attn\.o_proj\.weight",
    ),
    "no embedding": (lambda w: w.pop("tok_embeddings.weight"), r"no tok_embeddings\.weight"),
    "extra tensor": (
        lambda w: w.update({"layers.0.attention.q_norm.weight": torch.ones(64)}),
        r"not expected: layers\.0\.attention\.q_norm\.weight",
    ),
    "shape": (
        lambda w: w.update({"layers.0.feed_forward.w2.weight": torch.ones(64, 200)}),
        r"mlp\.down_proj\.weight has shape \[64, 200\], expected \[64, 224\]",
    ),
    "dtype": (
        lambda w: w.update({"norm.weight": torch.ones(64, dtype=torch.int8)}),
        r"norm\.weight has dtype torch\.int8",
    ),
    "flat matrix": (
        lambda w: w.update({"output.weight": torch.ones(64)}),
        r"lm_head\.weight has shape \[64\]",
    ),
    "flat embedding": (
        lambda w: w.update({"tok_embeddings.weight": torch.ones(())}),
        r"no tok_embeddings\.weight, a matrix",
    ),
    "not a tensor": (lambda w: w.update({"norm.weight": "x"}), r"'norm\.weight' is not a plain tensor"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_weights_are_refused(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    weights = meta_weights(source_model())
    damage(weights)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(tmp_path, weights))


def test_nan_is_refused_by_name(tmp_path: Path) -> None:
    weights = meta_weights(source_model())
    weights["layers.0.attention.wk.weight"][3, 3] = float("nan")
    checkpoint = open_checkpoint(write(tmp_path, weights))
    with pytest.raises(CheckpointError, match=r"k_proj\.weight holds 1 values that are NaN"):
        load_llama(checkpoint, 8)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never be run",))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="not a file of plain tensors"):
        open_checkpoint(write(tmp_path, {"norm.weight": _Code()}))
    assert "never be run" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "old format", "a list"])
def test_a_file_that_is_not_tensors_is_refused(damage: str, tmp_path: Path) -> None:
    file = write(tmp_path, meta_weights(source_model())) / "consolidated.00.pth"
    if damage == "old format":
        torch.save({"norm.weight": torch.ones(4)}, file, _use_new_zipfile_serialization=False)
    elif damage == "a list":
        torch.save([torch.ones(4)], file)
    else:
        content = file.read_bytes()
        file.write_bytes(
            {"empty": b"", "truncated": content[: len(content) // 2], "text": b"not weights"}[damage]
        )
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    weights = meta_weights(source_model())
    write(tmp_path, *(shard(weights, i, 2, embedding=0) for i in range(2)))
    (tmp_path / "consolidated.01.pth").rename(tmp_path / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match="without a gap"):
        open_checkpoint(tmp_path)
    (tmp_path / "consolidated.02.pth").unlink()
    with pytest.raises(CheckpointError, match="has shape"):
        open_checkpoint(tmp_path)
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"no consolidated\.\*\.pth"):
        open_checkpoint(tmp_path)


def test_shards_of_different_models_are_refused(tmp_path: Path) -> None:
    weights = meta_weights(source_model())
    parts = [shard(weights, i, 2, embedding=0) for i in range(2)]
    parts[1]["norm.weight"] = parts[1]["norm.weight"] + 1
    checkpoint = open_checkpoint(write(tmp_path, *parts))
    with pytest.raises(CheckpointError, match=r"norm\.weight differs between the shards"):
        load_llama(checkpoint, 8)
    parts[1]["layers.0.attention.wq.weight"] = torch.ones(16, 64)
    with pytest.raises(CheckpointError, match=r"shards hold layers\.0\.attention\.wq\.weight as"):
        open_checkpoint(write(tmp_path, *parts))
    del parts[1]["layers.0.attention.wq.weight"]
    with pytest.raises(CheckpointError, match=r"attention\.wq\.weight is missing from consolidated\.01\.pth"):
        open_checkpoint(write(tmp_path, *parts))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path, meta_weights(source_model(vocab_size=500)))
    with pytest.raises(TokenizerError, match="only 500 embeddings"):
        open_checkpoint(tmp_path)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path, meta_weights(source_model()))
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json and no tokenizer\.model"):
        open_checkpoint(tmp_path)
