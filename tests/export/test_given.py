"""Recipe `as-is`: every artifact holds the checkpoint's codes and scales, bit for bit, or the export is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgellama.bundle.restore import quantized_modules
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.given import Given
from edgellama.errors import LoweringError, RecipeError
from edgellama.export.forecast import describe
from edgellama.export.lower import lowering_for, write_client_files
from edgellama.export.plan import make_plan
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.recipe import RECIPES, PerGroup, Recipe, Rule, Scheme, altered_fields
from edgellama.targets import Target, find_target
from edgellama.targets.xnnpack.scales import pair
from tests.helpers.quantized_models import (
    codes_by_hand,
    gguf_checkpoint,
    gptq_checkpoint,
    package_checkpoint,
)
from tests.helpers.tiny_models import CONTEXT, provenance

AS_IS = RECIPES["as-is"]
TARGETS = ("xnnpack", "coreml", "coreml-pte", "onnx", "gguf", "mlx")
Make = Callable[[Path, Checkpoint], Path]

SOURCES: dict[str, Make] = {
    "AutoRound": lambda path, tiny: package_checkpoint(path / "auto_round", "auto_round"),
    "AWQ": lambda path, tiny: package_checkpoint(path / "awq", "awq"),
    "compressed-tensors": lambda path, tiny: package_checkpoint(path / "packed", "compressed_tensors"),
    "GPTQ": lambda path, tiny: gptq_checkpoint(path / "gptq", codes_by_hand(32)),
    "GPTQ rows": lambda path, tiny: gptq_checkpoint(path / "rows", codes_by_hand(None), group=None),
    "Q4_0": lambda path, tiny: gguf_checkpoint(
        path / "q4_0.gguf", tiny.first_layers(1), {"model.embed_tokens": "Q8_0"}, "Q4_0"
    ),
    "Q8_0": lambda path, tiny: gguf_checkpoint(path / "q8_0.gguf", tiny.first_layers(1), {}, "Q8_0"),
}


@pytest.fixture(scope="module")
def source(
    tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Checkpoint]:
    """`source(name)`: a quantized checkpoint of one layer, made once."""
    directory, opened = tmp_path_factory.mktemp("given"), dict[str, Checkpoint]()

    def checkpoint(name: str) -> Checkpoint:
        if name not in opened:
            opened[name] = open_checkpoint(SOURCES[name](directory, tiny_checkpoint))
        return opened[name]

    return checkpoint


def given_model(checkpoint: Checkpoint, *targets: str) -> tuple[Recipe, Llama, Given]:
    plan = make_plan(checkpoint, AS_IS, [find_target(name) for name in targets], CONTEXT)
    model, _ = quantized_llama(checkpoint, plan.recipe, CONTEXT)
    assert checkpoint.given is not None
    return plan.recipe, model, checkpoint.given


def lowered(target: Target, checkpoint: Checkpoint, recipe: Recipe, model: Llama, path: Path) -> Path:
    artifact = target.artifact_in(path)
    artifact.parent.mkdir(parents=True, exist_ok=True)
    lower = lowering_for(target, checkpoint.tokenizer)
    lower(model, artifact, provenance(recipe), progress=Progress())
    write_client_files(target, checkpoint, model, artifact, provenance(recipe))
    return artifact


def holds(stored: list[tuple[Tensor, Tensor]], values: Tensor, scales: Tensor) -> bool:
    """Whether one of the stored weights has these rows one after the other. Repeated scales count as one."""
    rows, columns = values.shape
    for codes, stored_scales in stored:
        if codes.shape[1] != columns or len(codes) < rows:
            continue
        wide = stored_scales.repeat_interleave(columns // stored_scales.shape[1], 1)
        wanted = scales.repeat_interleave(columns // scales.shape[1], 1)
        for start in range(len(codes) - rows + 1):
            part = slice(start, start + rows)
            if torch.equal(codes[start], values[0]) and torch.equal(codes[part], values):
                return torch.equal(wide[part], wanted)
    return False


@pytest.mark.parametrize("target", [pytest.param(t, marks=pytest.mark.slow) for t in TARGETS])
@pytest.mark.parametrize("name", ["AutoRound", "GPTQ", "GPTQ rows", "Q4_0"])
def test_artifacts_hold_the_codes_and_scales_of_the_checkpoint(
    name: str, target: str, source: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    checkpoint, chosen = source(name), find_target(target)
    recipe, model, given = given_model(checkpoint, target)
    artifact = lowered(chosen, checkpoint, recipe, model, tmp_path)
    stored = list(chosen.stored_codes(artifact))
    taken = [m for m in given.schemes if m.startswith("model.layers.")]
    assert len(taken) == 7
    if target != "xnnpack" and "model.embed_tokens" in given.schemes:
        taken.append("model.embed_tokens")
    for module in taken:
        codes = given.codes(module)
        assert holds(stored, codes.values, codes.scales), module
    checks = chosen.check_structure(artifact, model, provenance(recipe))
    assert [(c.name, c.detail) for c in checks if c.verdict == "fail"] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["coreml", "onnx", "gguf", "mlx"])
def test_groups_of_int8_are_held_where_the_format_has_them(
    target: str, source: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    test_artifacts_hold_the_codes_and_scales_of_the_checkpoint("Q8_0", target, source, tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_the_model_has_the_codes_and_only_float_tables_are_rounded(
    name: str, source: Callable[[str], Checkpoint]
) -> None:
    checkpoint = source(name)
    recipe, model, given = given_model(checkpoint, "gguf")
    for module, codes in quantized_modules(model):
        if module in given.schemes:
            expected = given.codes(module)
            assert torch.equal(codes.values, expected.values)
            assert torch.equal(codes.scales, expected.scales)
    _, rows = quantized_llama(checkpoint, recipe, CONTEXT)
    quantized = {row.name.removesuffix(".weight"): row for row in rows if row.bits < 32}
    assert {n for n, row in quantized.items() if row.given} == given.schemes.keys() & quantized.keys()
    assert all(row.to_dict()["sqnr_db"] is None for row in quantized.values() if row.given)
    assert altered_fields(recipe) == []
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_tied_table_of_codes_is_shared(source: Callable[[str], Checkpoint]) -> None:
    _, model, _ = given_model(source("Q4_0"), "gguf")
    tables = dict(quantized_modules(model))
    assert tables["lm_head"].values.data_ptr() == tables["model.embed_tokens"].values.data_ptr()


def test_a_table_that_a_target_cannot_hold_is_rounded_and_named(source: Callable[[str], Checkpoint]) -> None:
    plan = make_plan(source("Q4_0"), AS_IS, [find_target("xnnpack"), find_target("gguf")], CONTEXT)
    assert describe(plan)["codes"]["rounded"] == ["model.embed_tokens", "lm_head"]
    alone = make_plan(source("Q4_0"), AS_IS, [find_target("gguf")], CONTEXT)
    assert describe(alone)["codes"]["rounded"] == []
    assert describe(alone)["codes"]["taken"] == 9


@pytest.mark.parametrize("name", ["AutoRound", "GPTQ", "Q4_0"])
@pytest.mark.parametrize("target", [pytest.param("xnnpack", marks=pytest.mark.slow), "onnx", "gguf", "mlx"])
def test_planned_bytes_are_those_of_the_file(
    name: str, target: str, source: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    checkpoint, chosen = source(name), find_target(target)
    plan = make_plan(checkpoint, AS_IS, [chosen], CONTEXT)
    planned = describe(plan)["artifacts"][0]["bytes"]
    model, _ = quantized_llama(checkpoint, plan.recipe, CONTEXT)
    artifact = lowered(chosen, checkpoint, plan.recipe, model, tmp_path)
    entry = chosen.describe(artifact, model)
    weights = sum(row["bytes"] for row in entry["quantization"])
    assert 0.93 * weights <= planned <= entry["bytes"] + 20_000


def test_other_recipes_refuse_codes_with_the_way_out(source: Callable[[str], Checkpoint]) -> None:
    with pytest.raises(RecipeError, match=r"its weights are codes already \(AutoRound") as raised:
        make_plan(source("AutoRound"), RECIPES["int4"], [find_target("onnx")], CONTEXT)
    assert "`-r as-is`" in raised.value.remedy
    make_plan(source("Q4_0"), RECIPES["int4-fast"], [find_target("onnx")], CONTEXT)  # a GGUF file is a source


def test_as_is_refuses_float_weights_and_other_quantizations(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="has none: it is not quantized"):
        make_plan(tiny_checkpoint, AS_IS, [find_target("onnx")], CONTEXT)
    kinds = {"model.layers.0.mlp.up_proj": "Q4_1"}
    path = gguf_checkpoint(tmp_path / "m.gguf", tiny_checkpoint.first_layers(1), kinds, "Q4_0")
    with pytest.raises(RecipeError, match=r"not taken as codes: model.layers.0.mlp.up_proj \(Q4_1\)"):
        make_plan(open_checkpoint(path), AS_IS, [find_target("onnx")], CONTEXT)


def test_xnnpack_refuses_groups_of_int8_by_name(source: Callable[[str], Checkpoint]) -> None:
    with pytest.raises(RecipeError, match="would be int8 in groups, and target 'xnnpack'") as raised:
        make_plan(source("Q8_0"), AS_IS, [find_target("xnnpack")], CONTEXT)
    assert "Use recipe int8" in raised.value.remedy


def test_a_recipe_that_rotates_codes_is_refused() -> None:
    with pytest.raises(RecipeError, match="rotation 'values' would change the codes"):
        replace(AS_IS, name="mine", rotation="values")


def test_a_rule_keeps_a_module_of_codes_in_float(source: Callable[[str], Checkpoint]) -> None:
    checkpoint = source("AutoRound")
    kept = "model.layers.0.mlp.down_proj"
    recipe = replace(AS_IS, name="mine", rules=(Rule(kept, None), *AS_IS.rules))
    plan = make_plan(checkpoint, recipe, [find_target("onnx")], CONTEXT)
    model, _ = quantized_llama(checkpoint, plan.recipe, CONTEXT)
    assert torch.equal(model.get_submodule(kept).get_parameter("weight"), checkpoint.tensor(f"{kept}.weight"))


def test_scales_that_a_format_does_not_hold_are_refused_by_name(tmp_path: Path) -> None:
    codes = codes_by_hand(32, scales=torch.float32)
    checkpoint = open_checkpoint(gptq_checkpoint(tmp_path / "model", codes))
    recipe, model, _ = given_model(checkpoint, "onnx")
    for target, message in (("gguf", "are no float16 numbers"), ("mlx", "has no exact float16")):
        with pytest.raises(LoweringError, match=message):
            lowered(find_target(target), checkpoint, recipe, model, tmp_path / target)


def test_a_scale_is_the_difference_of_two_positive_bfloat16_numbers() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    scales = every[torch.isfinite(every)].reshape(1, -1)
    two = pair(scales, "every float16 number", grouped=True)
    assert two is not None
    a, b = two
    assert torch.equal(a - b, scales)
    for part in (a, b):
        assert bool((part > 0).all())
        assert torch.equal(part, part.to(torch.bfloat16).float())
    assert pair(torch.tensor([[0.5, 2.0]]), "plain", grouped=True) is None
    rows = pair(torch.tensor([[0.1], [-0.1]]), "rows", grouped=False)
    assert rows is not None
    assert torch.equal(rows[0] - rows[1], torch.tensor([[0.1], [-0.1]]))
    with pytest.raises(LoweringError, match="q_proj: its scales have more bits than float16"):
        pair(torch.tensor([[0.1]]), "q_proj", grouped=True)


def test_paired_scales_are_written_only_where_they_are() -> None:
    plain, paired = Scheme(4, PerGroup(32)), Scheme(4, PerGroup(32), paired_scales=True)
    assert plain == paired
    assert "paired_scales" not in plain.to_dict()
    assert Scheme.from_dict(paired.to_dict()).paired_scales
