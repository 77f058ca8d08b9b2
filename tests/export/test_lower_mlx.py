"""Target `mlx`: the directory holds the quantized model's own codes, exactly, and nothing that a run could change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgellama.checkpoints import Checkpoint
from edgellama.cli.dispatch import main
from edgellama.errors import LoweringError, RecipeError
from edgellama.export.mlx.files import client_files
from edgellama.export.mlx.lower import lower_to_mlx
from edgellama.export.plan import make_plan
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.formats.mlx_model import read_mlx
from edgellama.host.progress import Progress
from edgellama.model.config import LlamaConfig, RopeScaling
from edgellama.model.llama import Llama, inverse_frequencies
from edgellama.model.quantized import Codes, apply_codes, codes_of
from edgellama.recipe import RECIPES, PerChannel, PerGroup, Recipe, Rule, Scheme
from edgellama.targets import TARGETS
from edgellama.targets.mlx.interface import config_data
from edgellama.targets.mlx.rope import rope_scaling
from edgellama.targets.mlx.storage import STORAGE
from edgellama.targets.mlx.structure import check_structure, stored_codes
from edgellama.targets.sizes import planned_bytes
from tests.helpers.tiny_models import provenance, random_checkpoint

CONTEXT = 16
DTYPES = ("float16", "bfloat16")
INT8 = Scheme(8, PerChannel())
TABLE = Rule("model.embed_tokens", Scheme(8, PerChannel(), int8_activations=False))


def recipe_of(linears: Scheme | None, dtype: str = "float16") -> Recipe:
    return replace(RECIPES["int8"], name="mine", rules=(TABLE, Rule("*", linears)), mlx_dtype=dtype)


def lowered(checkpoint: Checkpoint, recipe: Recipe, path: Path) -> Llama:
    """Lowers the checkpoint to a directory at `path` and returns the quantized model."""
    model, _ = quantized_llama(checkpoint, recipe, CONTEXT)
    lower_to_mlx(model, path, provenance(recipe), progress=Progress())
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One layer with biases, rows of 64, 128 and 160, and an output layer of its own."""
    changes = {
        "intermediate_size": 160,
        "num_attention_heads": 8,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }
    return random_checkpoint(tmp_path_factory.mktemp("small") / "model", changes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [Scheme(4, PerGroup(32)), INT8, None], ids=["int4", "int8", "float"])
def test_every_value_is_the_models(
    scheme: Scheme | None, dtype: str, small: Checkpoint, tmp_path: Path
) -> None:
    recipe = recipe_of(scheme, dtype)
    model = lowered(small, recipe, tmp_path / "mlx")
    failed = [c for c in check_structure(tmp_path / "mlx", model, provenance(recipe)) if c.verdict != "pass"]
    assert failed == []
    file = read_mlx(tmp_path / "mlx")
    compared = 0
    for name, module in model.named_modules():
        if name in file.quantized:
            packed, codes = file.packed(name), codes_of(module)
            assert codes is not None
            groups = packed.codes.float().unflatten(1, (-1, packed.group_size))
            values = groups * packed.scales[..., None] + packed.biases[..., None]
            assert torch.equal(values.flatten(1), codes.dequantize())
            compared += 1
    assert compared == (9 if scheme else 1)
    assert {t.dtype for t in file.tensors.values()} == {"uint32", dtype}


def test_a_row_of_160_has_groups_of_32_and_others_of_64(small: Checkpoint, tmp_path: Path) -> None:
    lowered(small, recipe_of(INT8), tmp_path / "mlx")
    file = read_mlx(tmp_path / "mlx")
    assert file.layout("model.layers.0.mlp.down_proj") == (32, 8)
    assert file.layout("model.layers.0.mlp.up_proj") == file.layout("lm_head") == (64, 8)
    assert file.config["quantization"] == {
        "group_size": 64,
        "bits": 8,
        "model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 8},
    }
    assert file.config["quantization_config"] == file.config["quantization"]


def test_the_bytes_are_those_that_were_planned_and_the_same_each_time(
    small: Checkpoint, tmp_path: Path
) -> None:
    recipe = recipe_of(Scheme(4, PerGroup(32)))
    model = lowered(small, recipe, tmp_path / "one")
    lowered(small, recipe, tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    stored = sum(t.nbytes for t in read_mlx(tmp_path / "one").tensors.values())
    # Every row of the table and of the output layer is a multiple of 64.
    assert stored == planned_bytes(model.config, recipe, STORAGE, CONTEXT)


def test_the_codes_are_read_back_with_one_scale_per_row(small: Checkpoint, tmp_path: Path) -> None:
    model = lowered(small, recipe_of(INT8), tmp_path / "mlx")
    codes = codes_of(model.lm_head)
    assert codes is not None
    assert any(
        torch.equal(values, codes.values) and torch.equal(scales, codes.scales)
        for values, scales in stored_codes(tmp_path / "mlx")
    )


@pytest.mark.parametrize("scale", [600.0, 2.0**-20 * 1.0078125])
def test_a_scale_that_float16_cannot_hold_is_refused_by_name(
    scale: float, small: Checkpoint, tmp_path: Path
) -> None:
    """600 * 128 is beyond float16; the other scale has more bits than a subnormal float16."""
    model, _ = quantized_llama(small, recipe_of(INT8), CONTEXT)
    name = "model.layers.0.mlp.gate_proj"
    codes = codes_of(model.get_submodule(name))
    assert codes is not None
    scales = codes.scales.clone()
    scales[3] = scale
    apply_codes(model, name, Codes(codes.values, scales, codes.scheme))
    with pytest.raises(LoweringError, match=f"{name}.*has no exact float16") as refusal:
        lower_to_mlx(model, tmp_path / "half", provenance(recipe_of(INT8)), progress=Progress())
    assert "bfloat16" in refusal.value.remedy
    wide = provenance(recipe_of(INT8, "bfloat16"))
    lower_to_mlx(model, tmp_path / "brain", wide, progress=Progress())


def test_a_float_beyond_float16_is_refused_by_name(small: Checkpoint, tmp_path: Path) -> None:
    model, _ = quantized_llama(small, recipe_of(None), CONTEXT)
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    with pytest.raises(LoweringError, match=r"model\.norm\.weight: a value of 1e"):
        lower_to_mlx(model, tmp_path / "half", provenance(recipe_of(None)), progress=Progress())


def test_groups_and_rows_that_mlx_has_not_are_refused(tmp_path: Path) -> None:
    changes = {"hidden_size": 192, "intermediate_size": 192, "head_dim": 48}
    checkpoint = random_checkpoint(tmp_path / "model", changes)
    with pytest.raises(RecipeError, match=r"groups of 96, and MLX has groups of 32, 64 and 128"):
        make_plan(checkpoint, recipe_of(Scheme(4, PerGroup(96))), [TARGETS["mlx"]], CONTEXT)
    odd = random_checkpoint(tmp_path / "odd", {"intermediate_size": 72})
    with pytest.raises(RecipeError, match=r"down_proj would have rows of 72, no multiple of 32"):
        make_plan(odd, recipe_of(INT8), [TARGETS["mlx"]], CONTEXT)
    make_plan(odd, recipe_of(INT8), [TARGETS["xnnpack"]], CONTEXT)


def llama3(config: LlamaConfig) -> RopeScaling:
    """Factors as a GGUF file of Llama 3.2 holds them."""
    plain = inverse_frequencies(config)
    scaled = inverse_frequencies(replace(config, rope_scaling=RopeScaling("llama3", 32.0)))
    return RopeScaling("frequency_factors", factors=tuple((plain / scaled).tolist()))


def test_factors_of_a_gguf_file_become_the_formula_that_they_follow(small: Checkpoint) -> None:
    config = replace(small.config, head_dim=64, rope_theta=500000.0)
    known = replace(config, rope_scaling=llama3(config))
    assert rope_scaling(known) == {
        "rope_type": "llama3",
        "factor": pytest.approx(32.0),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert rope_scaling(replace(config, rope_scaling=RopeScaling("linear", 2.0))) == {
        "rope_type": "linear",
        "factor": 2.0,
    }
    other = RopeScaling("frequency_factors", factors=tuple(1.0 + i for i in range(32)))
    with pytest.raises(RecipeError, match="RoPE factors of its own"):
        rope_scaling(replace(config, rope_scaling=other))


def test_a_tied_table_is_stored_once_if_both_uses_are_equal(tmp_path: Path) -> None:
    tied = random_checkpoint(tmp_path / "model", {"intermediate_size": 128})
    lowered(tied, recipe_of(INT8), tmp_path / "once")
    once = read_mlx(tmp_path / "once")
    assert once.config["tie_word_embeddings"] and "lm_head.weight" not in once.tensors
    apart = replace(recipe_of(INT8), rules=(TABLE, Rule("lm_head", None), Rule("*", INT8)))
    model = lowered(tied, apart, tmp_path / "twice")
    twice = read_mlx(tmp_path / "twice")
    assert not twice.config["tie_word_embeddings"] and twice.tensors["lm_head.weight"].dtype == "float16"
    assert all(c.verdict == "pass" for c in check_structure(twice.path, model, provenance(apart)))


def test_files_beside_the_weights(small: Checkpoint) -> None:
    model, recipe = quantized_llama(small, recipe_of(INT8), CONTEXT)[0], recipe_of(INT8)
    tokenizer = {
        "tokenizer.json": b"{}",
        "generation_config.json": b'{"temperature": 0.6, "eos_token_id": 9}',
    }
    files = client_files(tokenizer, model, provenance(recipe))
    assert files["tokenizer.json"] == b"{}"
    generation: dict[str, Any] = json.loads(files["generation_config.json"])
    eos = list(small.config.eos_token_ids)
    assert generation == {"temperature": 0.6, "bos_token_id": 0, "eos_token_id": eos} and eos != [9]
    assert json.loads(files["config.json"]) == json.loads(json.dumps(config_data(small.config, recipe)))


def test_inspect(small: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lowered(small, recipe_of(Scheme(4, PerGroup(32))), tmp_path / "mlx")
    assert main(["inspect", str(tmp_path / "mlx"), "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kind"] == "mlx" and data["metadata"]["format"] == "mlx"
    rows = {(row["modules"], row["scheme"], row["group_size"]): row["tensors"] for row in data["weights"]}
    assert rows == {("linear", "int4", 32): 8, ("embedding", "int8", 64): 1}
