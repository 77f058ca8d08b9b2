"""Targets `coreml` and `coreml-pte`: artifacts store the codes exactly and match the quantized model."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from torch import Tensor

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint
from edgellama.cli.dispatch import main
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.errors import BundleError, LoweringError, MissingDependencyError, RecipeError, UsageError
from edgellama.export.coreml.lower import lower_to_coreml
from edgellama.export.coreml.lower_pte import lower_to_coreml_pte
from edgellama.export.plan import make_plan
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.formats.coreml_pte import extracted_package
from edgellama.formats.mlpackage import read_mlpackage
from edgellama.gate.agreement import measure_agreement
from edgellama.gate.metrics import kl_divergence
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.recipe import RECIPES, Recipe
from edgellama.runtimes.coreml import CoremlRuntime, Interface, open_coreml, open_coreml_pte
from edgellama.runtimes.coreml_engine import AppleEngine
from edgellama.runtimes.load import load
from edgellama.runtimes.mil.engine import MilEngine
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.targets import TARGETS, find_target
from edgellama.targets.coreml.interface import PREFILL_TOKENS
from edgellama.targets.coreml.numerics import coreml_numerics
from edgellama.targets.coreml.structure import check_pte_structure, check_structure
from edgellama.targets.provenance import recipe_for
from edgellama.targets.sizes import planned_bytes
from edgellama.text.windows import default_texts
from tests.helpers.tiny_models import CONTEXT, provenance, random_checkpoint, weight_of

pytestmark = pytest.mark.slow

GPU, ANE = RECIPES["int4-fast"], RECIPES["int8-ane"]
TOKENS = [(37 * i + 11) % 512 for i in range(CONTEXT)]


@pytest.fixture(scope="module")
def artifacts(
    tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Llama, Path]]:
    """Quantized models and their artifacts by kind: profiles `gpu` and `ane`, and `pte`."""
    directory, artifacts_by_kind = tmp_path_factory.mktemp("coreml"), {}
    for recipe in (GPU, ANE):
        model, _ = quantized_llama(tiny_checkpoint, recipe, CONTEXT)
        path = directory / f"{recipe.coreml_profile}.mlpackage"
        lower_to_coreml(model, path, provenance(recipe), progress=Progress())
        artifacts_by_kind[recipe.coreml_profile] = (model, path)
    model, path = artifacts_by_kind["gpu"][0], directory / "model.pte"
    lower_to_coreml_pte(model, path, provenance(GPU), progress=Progress())
    return {**artifacts_by_kind, "pte": (model, path)}


def reference(model: Llama, tokens: list[int]) -> Tensor:
    """Logits [T, vocab_size] of the quantized model with the target's numerics."""
    with coreml_numerics(model):
        return ReferenceRuntime(model).forward_all(tokens)


def runtime(path: Path, mode: Any = "fp16") -> CoremlRuntime:
    """Artifact in the reference interpreter, with float16 or float32 arithmetic."""
    if path.suffix == ".pte":
        with extracted_package(path) as package:
            return CoremlRuntime(MilEngine(package, mode), Interface.read(package))
    return CoremlRuntime(MilEngine(path, mode), Interface.read(path))


@pytest.mark.parametrize("kind", ["gpu", "ane", "pte"])
def test_artifacts_match_the_quantized_model(kind: str, artifacts: dict[str, tuple[Llama, Path]]) -> None:
    """Tokens go in by pieces and one at a time. Only fp16 rounding separates artifact and model."""
    model, path = artifacts[kind]
    expected = reference(model, TOKENS)
    exact = runtime(path, "fp32")
    actual = torch.cat([exact.forward_all(TOKENS[:70]), exact.forward_all(TOKENS[70:])])
    # Tables, norms and weights are float16.
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-2)
    assert kl_divergence(expected, actual).mean() < 1e-6
    rounded = runtime(path)
    steps = torch.from_numpy(np.stack([rounded.forward([token]) for token in TOKENS]))
    assert kl_divergence(expected, steps).mean() < 1e-4
    assert torch.equal(
        steps.argmax(-1)[expected.topk(2).values.diff().abs()[:, 0] > 0.05],
        expected.argmax(-1)[expected.topk(2).values.diff().abs()[:, 0] > 0.05],
    )
    assert rounded.name == "mil-reference"


@pytest.mark.parametrize("kind", ["gpu", "ane", "pte"])
@pytest.mark.parametrize("pieces", [(1,), (2, 31), (PREFILL_TOKENS, 1), (33, 5, 64), (CONTEXT,)])
def test_prompts_of_any_length_at_any_position(
    kind: str, pieces: tuple[int, ...], artifacts: dict[str, tuple[Llama, Path]]
) -> None:
    """Static functions write more rows than they are given. The extra rows never affect logits."""
    model, path = artifacts[kind]
    coreml_runtime, position = runtime(path), 0
    expected = reference(model, TOKENS)
    while position < CONTEXT:
        count = min(pieces[position % len(pieces)], CONTEXT - position)
        actual = torch.from_numpy(coreml_runtime.forward(TOKENS[position : position + count]))
        position += count
        assert float(kl_divergence(expected[position - 1 : position], actual[None])[0]) < 1e-3


def test_the_codes_in_the_package_are_the_recipes_own(artifacts: dict[str, tuple[Llama, Path]]) -> None:
    """Read back by coremltools' own loader, independently of ours."""
    from coremltools.converters.mil.frontend.milproto.load import load as load_program

    model, path = artifacts["gpu"]
    spec = ct.utils.load_spec(str(path))
    program = load_program(spec, spec.specificationVersion, str(path / "Data/com.apple.CoreML/weights"))
    operators = {
        op.outputs[0].name: op
        for op in program.functions["main"].operations
        if op.op_type == "constexpr_blockwise_shift_scale"
    }
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert len(operators) == len(linears) + 1
    for name in linears:
        op, weight = operators[f"{name}.weight".replace(".", "_")], weight_of(model, name)
        assert np.array_equal(op.data.val.astype(np.int8), weight.qdata.numpy())
        assert np.array_equal(op.scale.val.astype(np.float32), weight.scale.numpy())
        assert op.offset is None


CONFIGS: dict[str, dict[str, Any]] = {
    "biases": {"attention_bias": True, "mlp_bias": True},
    "untied": {"tie_word_embeddings": False},
    "one head each": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 1},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.mark.parametrize("recipe", ["int4-fast", "int8", "fp32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_llamas_of_every_kind(name: str, recipe: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "model", CONFIGS[name])
    model, _ = quantized_llama(checkpoint, RECIPES[recipe], 64)
    path = tmp_path / "model.mlpackage"
    lower_to_coreml(model, path, provenance(RECIPES[recipe]), progress=Progress())
    checks = check_structure(path, model, provenance(RECIPES[recipe]))
    assert [c for c in checks if c.verdict != "pass" and c.name != "structure.bytes"] == []
    assert (
        kl_divergence(reference(model, TOKENS[:64]), runtime(path, "fp32").forward_all(TOKENS[:64])).mean()
        < 1e-4
    )


def test_the_norm_survives_a_residual_stream_that_float16_cannot_square(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Real models carry values of 20,000 (SmolLM2-135M). Their squares are infinite in float16."""
    model, _ = quantized_llama(tiny_checkpoint.first_layers(1), RECIPES["fp32"], 32)
    with torch.no_grad():
        weight_of(model, "model.embed_tokens")[:, 5] = 20000.0
        weight_of(model, "model.layers.0.input_layernorm")[5] = 1e-3
        weight_of(model, "model.norm")[5] = 1e-3
    path = tmp_path / "model.mlpackage"
    lower_to_coreml(model, path, provenance(RECIPES["fp32"]), progress=Progress())
    coreml_runtime = runtime(path)
    actual = coreml_runtime.forward_all(TOKENS[:32])
    torch.testing.assert_close(actual, reference(model, TOKENS[:32]), rtol=0.01, atol=0.1)
    (check,) = coreml_runtime.checks()
    assert check.verdict == "pass" and float(check.value or 0) >= 20000


def test_overflow_is_a_failed_check(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, _ = quantized_llama(tiny_checkpoint.first_layers(1), RECIPES["fp32"], 32)
    with torch.no_grad():
        weight_of(model, "model.layers.0.mlp.down_proj").mul_(60000.0)
        weight_of(model, "model.layers.0.mlp.down_proj").clamp_(-60000, 60000)
        weight_of(model, "model.layers.0.post_attention_layernorm").mul_(30)
    path = tmp_path / "model.mlpackage"
    lower_to_coreml(model, path, provenance(RECIPES["fp32"]), progress=Progress())
    coreml_runtime = runtime(path)
    coreml_runtime.forward_all(TOKENS[:32])
    (check,) = coreml_runtime.checks()
    assert (check.name, check.verdict) == ("structure.float16_range", "fail")
    assert "model_layers_0_mlp_down_proj" in check.detail or "add" in check.detail


@pytest.mark.parametrize("kind", ["gpu", "ane", "pte"])
def test_the_same_model_gives_the_same_bytes(
    kind: str, artifacts: dict[str, tuple[Llama, Path]], tmp_path: Path
) -> None:
    model, path = artifacts[kind]
    repeated = tmp_path / path.name
    recipe = ANE if kind == "ane" else GPU
    lower = lower_to_coreml_pte if kind == "pte" else lower_to_coreml
    lower(model, repeated, provenance(recipe), progress=Progress())
    assert contents(repeated) == contents(path)
    if path.is_dir():
        ct.utils.load_spec(str(repeated))  # coremltools writes Manifest.json when it reads a package
        assert contents(repeated) == contents(path)


def contents(path: Path) -> dict[str, str]:
    """sha256 of each file by relative path."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_functions_share_their_weights(artifacts: dict[str, tuple[Llama, Path]]) -> None:
    package = read_mlpackage(artifacts["ane"][1])
    assert sorted(f.name for f in package.functions) == ["decode", "prefill"]
    decode_bytes = sum(w.nbytes for w in package.function("decode").weights.values())
    assert sum(w.nbytes for w in package.weights) <= decode_bytes
    assert package.weight_bytes < 1.03 * decode_bytes
    assert package.default_function == "decode"
    assert {s.name for s in package.functions[0].states} == {"keyCache", "valueCache"}


@pytest.mark.parametrize("recipe", ["int4-fast", "int8", "fp32"])
def test_planned_bytes_are_those_of_the_package(
    recipe: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model, _ = quantized_llama(tiny_checkpoint, RECIPES[recipe], CONTEXT)
    lower_to_coreml(model, tmp_path / "m.mlpackage", provenance(RECIPES[recipe]), progress=Progress())
    planned = planned_bytes(model.config, RECIPES[recipe], TARGETS["coreml"].storage, CONTEXT)
    weights = {
        n: w
        for n, w in read_mlpackage(tmp_path / "m.mlpackage").functions[0].weights.items()
        if "bias" not in n
    }
    assert 0 <= planned - sum(w.nbytes for w in weights.values()) <= 0.01 * planned  # small norms are inline


Alter = Callable[[Path, Any], None]


def transpose_a_scale(path: Path, spec: Any) -> None:
    """Stores the scales of a weight in column order: right in number, wrong in place."""
    weight = read_mlpackage(path).functions[0].weights["model_layers_1_self_attn_o_proj_weight"]
    scale = weight.parts["scale"]
    rewrite(path, scale.offset or 0, np.ascontiguousarray(scale.array().T).tobytes())


def flip_a_code(path: Path, spec: Any) -> None:
    data = read_mlpackage(path).functions[0].weights["model_layers_2_mlp_up_proj_weight"].parts["data"]
    stored = bytearray(blob(path, data.offset or 0, 1))
    rewrite(path, data.offset or 0, bytes([stored[0] ^ 0x10]))


def shift_a_table(path: Path, spec: Any) -> None:
    table = read_mlpackage(path).functions[0].producers["cos"].value
    assert table is not None
    rewrite(path, table.offset or 0, np.roll(table.array(), 1, axis=0).tobytes())


def blob(path: Path, offset: int, count: int) -> bytes:
    """Bytes of a weight. A header of 64 bytes at `offset` holds the start of the data."""
    stored = (path / "Data/com.apple.CoreML/weights/weight.bin").read_bytes()
    start = int.from_bytes(stored[offset + 16 : offset + 24], "little")
    return stored[start : start + count]


def rewrite(path: Path, offset: int, content: bytes) -> None:
    """Overwrites the data of a weight."""
    file = path / "Data/com.apple.CoreML/weights/weight.bin"
    stored = bytearray(file.read_bytes())
    start = int.from_bytes(stored[offset + 16 : offset + 24], "little")
    stored[start : start + len(content)] = content
    file.write_bytes(stored)


def another_manifest(path: Path, spec: Any) -> None:
    spec.description.metadata.userDefined["edgellama.manifest_sha256"] = "0" * 64


def claim_another_length(path: Path, spec: Any) -> None:
    spec.description.input[0].type.multiArrayType.shapeRange.sizeRanges[1].lowerBound = 2


@pytest.mark.parametrize(
    ("alter", "check", "detail"),
    [
        (transpose_a_scale, "structure.codes", "model.layers.1.self_attn.o_proj"),
        (flip_a_code, "structure.codes", "model.layers.2.mlp.up_proj"),
        (shift_a_table, "structure.constants", "cos in main"),
        (another_manifest, "structure.metadata", "edgellama.manifest_sha256 is '0000"),
        (claim_another_length, "structure.shape_ranges", "no function takes a single token"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planted_faults(
    alter: Alter, check: str, detail: str, artifacts: dict[str, tuple[Llama, Path]], tmp_path: Path
) -> None:
    model, source = artifacts["gpu"]
    path = tmp_path / "model.mlpackage"
    shutil.copytree(source, path)
    spec = ct.utils.load_spec(str(path))
    alter(path, spec)
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(spec.SerializeToString())
    failed = {c.name: c.detail for c in check_structure(path, model, provenance(GPU)) if c.verdict != "pass"}
    assert list(failed) == [check]
    assert detail in failed[check]


def test_a_healthy_package_passes(artifacts: dict[str, tuple[Llama, Path]]) -> None:
    for kind, recipe in (("gpu", GPU), ("ane", ANE)):
        model, path = artifacts[kind]
        assert [c for c in check_structure(path, model, provenance(recipe)) if c.verdict != "pass"] == []
    model, path = artifacts["pte"]
    assert [c for c in check_pte_structure(path, model, provenance(GPU)) if c.verdict != "pass"] == []


def test_weights_in_groups_are_refused_for_the_neural_engine(
    tiny_checkpoint: Checkpoint, artifacts: dict[str, tuple[Llama, Path]]
) -> None:
    wrong = replace(GPU, name="mine", coreml_profile="ane")
    coreml = [find_target("coreml")]
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.self_attn\.q_proj.*does not multiply"):
        make_plan(tiny_checkpoint, wrong, coreml, CONTEXT)
    make_plan(tiny_checkpoint, wrong, [find_target("xnnpack")], CONTEXT)
    model, path = artifacts["gpu"]
    failed = {c.name for c in check_structure(path, model, provenance(wrong)) if c.verdict != "pass"}
    assert {"structure.functions", "structure.block_weights", "structure.static_shapes"} <= failed


@pytest.mark.parametrize(("context", "message"), [(16, "at least 32 tokens"), (100, "the context is 100")])
def test_contexts_that_the_hardware_does_not_take_are_refused(
    context: int, message: str, tiny_checkpoint: Checkpoint
) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(tiny_checkpoint, ANE, [find_target("coreml")], context)


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown coreml_profile 'npu'"):
        Recipe.from_dict({**GPU.to_dict(), "coreml_profile": "npu"})
    without = {k: v for k, v in GPU.to_dict().items() if k != "coreml_profile"}
    assert Recipe.from_dict(without) == GPU


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.0.mlp.up_proj", 2.0**-25, "its smallest scale is 2.98e-08"),
        ("model.layers.0.mlp.up_proj", 1e6, "float16, in which Core ML stores scales"),
    ],
)
def test_scales_that_float16_rounds_are_refused(
    name: str, value: float, message: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model, _ = quantized_llama(tiny_checkpoint.first_layers(1), GPU, 32)
    weight_of(model, name).scale[0, 0] = value
    with pytest.raises(LoweringError, match=message):
        lower_to_coreml(model, tmp_path / "m.mlpackage", provenance(GPU), progress=Progress())
    assert list(tmp_path.iterdir()) == []


def test_a_float_weight_beyond_float16_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, _ = quantized_llama(tiny_checkpoint.first_layers(1), GPU, 32)
    with torch.no_grad():
        weight_of(model, "model.norm")[3] = 1e5
    with pytest.raises(LoweringError, match=r"model\.norm: a value of 1e\+05 is beyond float16"):
        lower_to_coreml(model, tmp_path / "m.mlpackage", provenance(GPU), progress=Progress())


def test_a_package_without_our_metadata_is_refused(
    artifacts: dict[str, tuple[Llama, Path]], tmp_path: Path
) -> None:
    path = tmp_path / "model.mlpackage"
    shutil.copytree(artifacts["gpu"][1], path)
    spec = ct.utils.load_spec(str(path))
    spec.description.metadata.userDefined.clear()
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(spec.SerializeToString())
    with pytest.raises(BundleError, match="not a package that edgellama wrote"):
        Interface.read(path)


@pytest.fixture(scope="module")
def coreml_bundle(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Validated bundle of both targets."""
    output = tmp_path_factory.mktemp("bundle") / "tiny.edgellama"
    return export(
        tiny_checkpoint, output, targets=["coreml", "coreml-pte"], recipe="int4-fast", context=CONTEXT
    )


def test_a_bundle_of_both_targets_passes_the_gate(coreml_bundle: Bundle) -> None:
    assert coreml_bundle.targets == ["coreml", "coreml-pte"]
    for name in coreml_bundle.targets:
        report = json.loads((coreml_bundle.path / "reports" / f"validate-{name}.json").read_text())
        assert report["verdict"] == "pass"
        assert report["runtime"] == "mil-reference"  # not measured on a device
        assert report["parity"]["kl_mean"] < 1e-4
        assert report["parity"]["top1_agreement_without_ties"] >= 0.99
        (other,) = set(coreml_bundle.targets) - {name}
        assert report["agreement"][other]["kl_mean"] < 1e-4
        assert report["agreement"][other]["tokens"] == 1024
        assert f"agreement.{other}" in {c["name"] for c in report["checks"]}
        assert "structure.float16_range" in {c["name"] for c in report["checks"]}
    package = read_mlpackage(coreml_bundle.artifact("coreml"))
    assert package.user_defined["edgellama.source_sha256"] == coreml_bundle.manifest["source"]["sha256"]
    requires = coreml_bundle.artifact_entry("coreml")["requires"]
    assert (requires["min_version"], requires["min_os"]["ios"]) == (str(package.specification), "18")
    assert json.loads(package.user_defined["edgellama.recipe"]) == recipe_for(
        coreml_bundle.recipe, ("coreml_profile",)
    )
    entry = coreml_bundle.artifact_entry("coreml")
    assert entry["requires"]["min_os"] == {"ios": "18", "macos": "15"}
    assert entry["inputs"][0] == {
        "name": "inputIds",
        "dtype": "int32",
        "shape": [1, "T"],
        "range": [1, CONTEXT],
    }
    assert set(coreml_bundle.artifact_entry("coreml-pte")["functions"]) == {"forward", "prefill"}


def test_disagreement_is_a_failed_check(
    coreml_bundle: Bundle, tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package has zeros for a weight: hashes are right, contents are wrong."""
    from edgellama.bundle.bundle import write_manifest

    broken = tmp_path / "broken.edgellama"
    shutil.copytree(coreml_bundle.path, broken)
    package = broken / "coreml/model.mlpackage"
    data = read_mlpackage(package).functions[0].weights["model_layers_2_mlp_up_proj_weight"].parts["data"]
    rewrite(package, data.offset or 0, bytes(data.nbytes))
    write_manifest(broken, {k: v for k, v in coreml_bundle.manifest.items() if k not in ("files", "schema")})
    assert main(["validate", str(broken), "--tokens", "256"]) == 1
    assert "FAIL agreement.coreml-pte" in capsys.readouterr().out
    figures = measure_agreement(Bundle.open(broken), ["coreml", "coreml-pte"], default_texts())
    assert figures["coreml", "coreml-pte"]["kl_mean"] > 0.01


def test_validate_alone_checks_consistency(coreml_bundle: Bundle) -> None:
    report = validate(coreml_bundle, target="coreml")
    assert report.passed and report.reference is None
    assert {c.name for c in report.checks} >= {"consistency.prefill_decode", "structure.float16_range"}


def test_load_uses_the_interpreter_outside_macos(coreml_bundle: Bundle) -> None:
    for target, opener in (("coreml", open_coreml), ("coreml-pte", open_coreml_pte)):
        with load(coreml_bundle, target) as loaded, opener(coreml_bundle.artifact(target)) as opened:
            assert loaded.name == "mil-reference"
            assert np.array_equal(loaded.forward([5, 6, 7]), opened.forward([5, 6, 7]))
            assert (loaded.vocab_size, loaded.context_length) == (512, CONTEXT)


@pytest.mark.skipif(sys.platform == "darwin", reason="there it works")
def test_apples_runtime_is_refused_outside_macos(coreml_bundle: Bundle) -> None:
    with pytest.raises(MissingDependencyError, match="Core ML runs on macOS only"):
        AppleEngine(coreml_bundle.artifact("coreml"))


@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on macOS only")
def test_core_ml_itself_agrees_with_the_interpreter(artifacts: dict[str, tuple[Llama, Path]]) -> None:
    model, path = artifacts["gpu"]
    apple = CoremlRuntime(AppleEngine(path), Interface.read(path))
    assert apple.name == "coreml"
    assert kl_divergence(reference(model, TOKENS), apple.forward_all(TOKENS)).mean() < 1e-3
    apple.reset()
    steps = torch.from_numpy(np.stack([apple.forward([token]) for token in TOKENS[:32]]))
    assert kl_divergence(reference(model, TOKENS[:32]), steps).mean() < 1e-3
