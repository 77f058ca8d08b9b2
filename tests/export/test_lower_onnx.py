"""Target `onnx`: both forms match the quantized model, and other engines and clients agree."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

import edgellama
from edgellama.bundle import Bundle
from edgellama.bundle.restore import code_hashes, restored_llama
from edgellama.checkpoints import Checkpoint
from edgellama.cli.dispatch import main
from edgellama.commands.export import export
from edgellama.errors import BundleError, MissingDependencyError, RecipeError
from edgellama.export.lower import lowering_for
from edgellama.export.onnx.lower import lower_to_onnx
from edgellama.export.plan import make_plan
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.formats.onnx_model import read_onnx
from edgellama.formats.onnx_weights import find_weight, weights_of
from edgellama.gate.metrics import kl_divergence
from edgellama.gate.parity import steps
from edgellama.gate.relowering import examine_relowering
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.model.quantized import codes_of
from edgellama.recipe import RECIPES, PerChannel, PerGroup, Recipe, Rule, Scheme
from edgellama.runtimes.load import opener_for
from edgellama.runtimes.onnx import OrtRuntime
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.targets import TARGETS, find_target
from edgellama.targets.onnx.interface import GENAI_FILE, PAST_KEY, PAST_VALUE, PRESENT_KEY, PRESENT_VALUE
from edgellama.targets.onnx.numerics import quantize_blocks
from edgellama.targets.onnx.structure import check_structure
from edgellama.targets.provenance import recipe_for
from edgellama.targets.sizes import planned_bytes
from tests.helpers.tiny_models import CONTEXT, provenance, random_checkpoint

FORMS = ("ort", "portable")
TOKENS = [(37 * i + 11) % 512 for i in range(CONTEXT)]
SHORT = TOKENS[:48]


def lowered(checkpoint: Checkpoint, recipe: Recipe, path: Path, context: int = CONTEXT) -> Llama:
    """Lowers the checkpoint to a directory at `path` and returns the quantized model."""
    model, _ = quantized_llama(checkpoint, recipe, context)
    lower_to_onnx(model, path, provenance(recipe), progress=Progress())
    return model


def reference(model: Llama, recipe: Recipe, tokens: list[int]) -> Tensor:
    """Logits [T, vocab_size] of the quantized model with the target's numerics."""
    with find_target("onnx").arithmetic(model, recipe):
        return steps(ReferenceRuntime(model), tokens)


def unexpected(path: Path, model: Llama, recipe: Recipe) -> list[str]:
    """Structure checks that fail. Files for clients are left out: the export writes them, not lowering."""
    checks = check_structure(path, model, provenance(recipe))
    return [f"{c.name}: {c.detail}" for c in checks if c.verdict != "pass" and c.name != "structure.clients"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["int4-fast", "int8", "fp32"])
def test_two_layers_token_by_token(form: str, name: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Two layers amplify rounding little, so an error of lowering is visible."""
    recipe = replace(RECIPES[name], onnx_form=form)
    model = lowered(tiny_checkpoint.first_layers(2), recipe, tmp_path / "onnx")
    assert unexpected(tmp_path / "onnx", model, recipe) == []
    with OrtRuntime(tmp_path / "onnx") as runtime:
        actual = steps(runtime, SHORT)
        kl = kl_divergence(reference(model, recipe, SHORT), actual)
        print(f"{form} {name}: mean KL {kl.mean():.1e}, first positions {kl[:8].mean():.1e}")
        # One flipped int8 rounding moves the rest of a window. Float has none.
        assert kl.mean() < (1e-3 if form == "ort" and name != "fp32" else 1e-9)
        assert kl[:8].mean() < 1e-9
        runtime.reset()
        assert runtime.name == "onnxruntime-cpu"
        assert torch.equal(steps(runtime, SHORT), actual)


@pytest.mark.parametrize("form", FORMS)
def test_prompts_of_any_length_at_any_position(
    form: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    recipe = replace(RECIPES["fp32"], onnx_form=form)
    model = lowered(tiny_checkpoint, recipe, tmp_path / "onnx")
    expected = reference(model, recipe, TOKENS)
    with OrtRuntime(tmp_path / "onnx") as runtime:
        for pieces in ((1,), (2, 31), (33, 5, 64), (CONTEXT,)):
            runtime.reset()
            position = 0
            while position < CONTEXT:
                count = min(pieces[position % len(pieces)], CONTEXT - position)
                actual = torch.from_numpy(runtime.forward(TOKENS[position : position + count]))
                position += count
                torch.testing.assert_close(actual, expected[position - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int4-fast", "int8", "fp32"])
def test_the_portable_form_in_onnx_s_own_interpreter(
    name: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """An engine that shares no code with ONNX Runtime runs a prompt, then steps on the returned cache."""
    recipe = replace(RECIPES[name], onnx_form="portable")
    model = lowered(tiny_checkpoint.first_layers(2), recipe, tmp_path / "onnx")
    engine = ReferenceEvaluator(onnx.load(tmp_path / "onnx" / "model.onnx"))
    config, past = model.config, np.zeros((1, model.config.num_key_value_heads, 0, model.config.head_dim))
    cache: dict[str, Any] = {
        past_name.format(layer): past.astype(np.float32)
        for layer in range(config.num_hidden_layers)
        for past_name in (PAST_KEY, PAST_VALUE)
    }
    expected, position = reference(model, recipe, TOKENS[:12]), 0
    names = [output.name for output in read_onnx(tmp_path / "onnx").outputs]
    for count in (7, 1, 4):
        tokens = np.array([TOKENS[position : position + count]])
        mask = np.ones((1, position + count), np.int64)
        outputs = dict(
            zip(names, engine.run(None, {"input_ids": tokens, "attention_mask": mask, **cache}), strict=True)
        )
        position += count
        torch.testing.assert_close(
            torch.from_numpy(outputs["logits"][0, 0]), expected[position - 1], rtol=1e-4, atol=1e-4
        )
        cache = {
            past_name.format(layer): outputs[present_name.format(layer)]
            for layer in range(config.num_hidden_layers)
            for past_name, present_name in ((PAST_KEY, PRESENT_KEY), (PAST_VALUE, PRESENT_VALUE))
        }


def test_the_portable_form_passes_the_full_check(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Shapes and types are inferred through every operator. All operators are of the default domain."""
    lowered(tiny_checkpoint, replace(RECIPES["int4-fast"], onnx_form="portable"), tmp_path / "onnx")
    onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"), full_check=True)
    file = read_onnx(tmp_path / "onnx")
    assert {node.domain for node in file.nodes} == {""}
    assert file.opsets == {"ai.onnx": 23}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "rms_norm_eps": 1e-6},
        {"head_dim": 32},
    ],
)
def test_models_of_any_shape(form: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Biases, an untied head, one key head for all query heads, and heads wider than the hidden size."""
    checkpoint = random_checkpoint(tmp_path / "model", changes)
    for name in ("int4-fast", "fp32"):
        recipe = replace(RECIPES[name], onnx_form=form)
        model = lowered(checkpoint, recipe, tmp_path / name, 16)
        assert unexpected(tmp_path / name, model, recipe) == []
        with OrtRuntime(tmp_path / name) as runtime:
            kl = kl_divergence(reference(model, recipe, TOKENS[:16]), steps(runtime, TOKENS[:16]))
        assert np.median(kl) < 1e-6


def test_mixed_schemes_are_not_joined(tmp_path: Path) -> None:
    """q in int8 cannot share a node with k and v in int4. gate and up still share one."""
    rows, int4 = Scheme(8, PerChannel()), Scheme(4, PerGroup(32))
    recipe = replace(
        RECIPES["int4-fast"],
        rules=(
            Rule("model.embed_tokens", Scheme(8, PerChannel(), int8_activations=False)),
            Rule("*.q_proj", rows),
            Rule("*.o_proj", None),
            Rule("lm_head", rows),
            Rule("*", int4),
        ),
    )
    model = lowered(random_checkpoint(tmp_path / "model", {}), recipe, tmp_path / "onnx", 16)
    assert unexpected(tmp_path / "onnx", model, recipe) == []
    names = read_onnx(tmp_path / "onnx").by_name
    assert "model.layers.0.self_attn.q_proj" in names and "model.layers.0.self_attn.qkv_proj" not in names
    assert "model.layers.0.mlp.gate_up_proj" in names
    with OrtRuntime(tmp_path / "onnx") as runtime:
        kl = kl_divergence(reference(model, recipe, TOKENS[:16]), steps(runtime, TOKENS[:16]))
    assert np.median(kl) < 1e-6


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 128), (8, 64), (8, 256)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_activations_are_quantized_as_the_kernel_does_it(bits: int, block: int, tokens: int) -> None:
    """Compares one MatMulNBits with the formula, on inputs with outliers and with a block of zeros."""
    generator = np.random.default_rng(0)
    rows, columns = 48, 512
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    codes = generator.integers(low, high, (rows, columns)).astype(np.int16)
    scales = generator.uniform(0.01, 0.1, (rows, columns // block)).astype(np.float32)
    unsigned = (codes + 2 ** (bits - 1)).astype(np.uint8)
    packed = unsigned[:, 0::2] | unsigned[:, 1::2] << 4 if bits == 4 else unsigned
    node = helper.make_node(
        "MatMulNBits",
        ["x", "weight", "scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, rows])],
        [
            numpy_helper.from_array(packed.reshape(rows, columns // block, -1), "weight"),
            numpy_helper.from_array(scales, "scales"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = generator.standard_normal((tokens, columns)).astype(np.float32)
    x[:, 5] *= 50
    x[:, :block] = 0
    (actual,) = session.run(None, {"x": x})
    weight = codes.reshape(rows, -1, block) * scales[..., None].astype(np.float64)
    expected = quantize_blocks(torch.from_numpy(x), block).double().numpy() @ weight.reshape(rows, columns).T
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    unquantized = x.astype(np.float64) @ weight.reshape(rows, columns).T
    assert np.abs(actual - unquantized).max() > 100 * np.abs(actual - expected).max()


@pytest.fixture(scope="module")
def onnx_bundle(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Validated bundle of the tiny model for ONNX and Core ML."""
    output = tmp_path_factory.mktemp("onnx") / "tiny.edgellama"
    return export(
        tiny_checkpoint, output, targets=["onnx", "coreml"], recipe="int4-fast", context=CONTEXT, max_kl=1.0
    )


def test_reports_and_metadata_of_a_bundle(onnx_bundle: Bundle) -> None:
    report = json.loads((onnx_bundle.path / "reports/validate-onnx.json").read_text())
    assert (report["verdict"], report["runtime"]) == ("pass", "onnxruntime-cpu")
    assert report["parity"]["kl_mean"] <= max(1e-3, 3 * report["parity"]["noise_floor_kl"])
    assert report["agreement"]["coreml"]["kl_mean"] < 0.04
    assert onnx_bundle.manifest["tools"].keys() >= {"onnx", "onnxruntime", "coremltools"}
    entry = onnx_bundle.artifact_entry("onnx")
    assert entry["bytes"] == sum(
        onnx_bundle.manifest["files"][f"onnx/{name}"]["bytes"] for name in ("model.onnx", "model.onnx.data")
    )
    rows = [(row["scheme"], row["group_size"], row["activations"]) for row in entry["quantization"]]
    assert rows == [("int4", 32, "int8"), ("int8", 128, "int8")]
    file = read_onnx(onnx_bundle.artifact("onnx"))
    assert file.metadata["edgellama.source_sha256"] == onnx_bundle.manifest["source"]["sha256"]
    assert json.loads(file.metadata["edgellama.recipe"]) == recipe_for(
        onnx_bundle.recipe, ("onnx_form", "onnx_rounding")
    )


def test_the_same_codes_as_every_target(onnx_bundle: Bundle, tiny_checkpoint: Checkpoint) -> None:
    """Codes read from the file equal those of the quantized model, the reference of every target."""
    model, _ = quantized_llama(tiny_checkpoint, onnx_bundle.recipe, CONTEXT)
    file = read_onnx(onnx_bundle.artifact("onnx"))
    weights = weights_of(file)
    for name in ("model.embed_tokens", "lm_head", "model.layers.1.mlp.down_proj"):
        weight_and_modules, codes = find_weight(weights, name), codes_of(model.get_submodule(name))
        assert weight_and_modules is not None and codes is not None
        values, scales = weight_and_modules[0].codes(file)
        np.testing.assert_array_equal(values, codes.values.numpy())
        np.testing.assert_array_equal(scales[:, 0], codes.scales[:, 0].numpy())


def test_onnxruntime_genai_generates_the_same(onnx_bundle: Bundle) -> None:
    """Greedy decoding of `og.Model` on the unchanged directory equals our own loop, token for token."""
    import onnxruntime_genai as og

    model = og.Model(str(onnx_bundle.path / "onnx"))
    theirs_tokenizer = og.Tokenizer(model)
    for prompt in ("The", "She was", "def f(x):\n"):
        ids = onnx_bundle.tokenizer.encode(prompt)
        assert list(theirs_tokenizer.encode(prompt)) == ids
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + 24)
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids)
        theirs = []
        while not generator.is_done():
            generator.generate_next_token()
            theirs.append(int(generator.get_next_tokens()[0]))
        with edgellama.load(onnx_bundle, target="onnx") as runtime:
            logits = runtime.forward(ids)
            ours = []
            for _ in theirs:
                ours.append(int(logits.argmax()))
                logits = runtime.forward(ours[-1:])
        assert ours == theirs and len(theirs) > 1


def test_onnxruntime_genai_passes_session_entries_on(onnx_bundle: Bundle, tmp_path: Path) -> None:
    """An entry of genai_config.json that ONNX Runtime refuses must be refused by `og.Model` too."""
    import onnxruntime_genai as og

    entry = "session.qdq_matmulnbits_accuracy_level"
    shutil.copytree(onnx_bundle.path / "onnx", tmp_path / "onnx")
    file = tmp_path / "onnx" / GENAI_FILE
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"][entry] = "99"
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RuntimeError, match="accuracy level must be between"):
        og.Model(str(tmp_path / "onnx"))


@pytest.mark.parametrize("form", FORMS)
def test_two_exports_have_equal_bytes(form: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe = replace(RECIPES["int4-fast"], name="mine", onnx_form=form)
    hashes, threads = set(), torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            output = tmp_path / str(number) / "m.edgellama"
            output.parent.mkdir()
            export(tiny_checkpoint, output, targets=["onnx"], recipe=recipe, context=CONTEXT, validate=False)
            hashes.add(hashlib.sha256((output / "manifest.json").read_bytes()).hexdigest())
    finally:
        torch.set_num_threads(threads)
    assert len(hashes) == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["int4-fast", "int8", "fp32"])
def test_weights_lie_in_the_file_once(
    form: str, name: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    recipe = replace(RECIPES[name], onnx_form=form)
    model = lowered(tiny_checkpoint, recipe, tmp_path / "onnx")
    planned = planned_bytes(model.config, recipe, TARGETS["onnx"].storage, CONTEXT)
    data = (tmp_path / "onnx" / "model.onnx.data").stat().st_size
    # Small tensors lie in model.onnx. A second table would add 12 %.
    assert 0.5 * planned < data < 1.03 * planned


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("*", Scheme(4, PerGroup(96)))], "groups of 96, which is no power of two"),
        ([Rule("*", Scheme(8, PerChannel()))], "rows of 24, which is no multiple of 16"),
    ],
)
def test_shapes_without_a_kernel_are_refused_by_name(rules: list[Rule], message: str, tmp_path: Path) -> None:
    hidden = 192 if "96" in message else 24
    changes = {
        "hidden_size": hidden,
        "intermediate_size": 192,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": hidden,
    }
    checkpoint = random_checkpoint(tmp_path / "model", changes)
    embedding = Rule("model.embed_tokens", None)
    recipe = replace(RECIPES["int8"], name="mine", rules=(embedding, *rules))
    with pytest.raises(RecipeError, match=message):
        make_plan(checkpoint, recipe, [TARGETS["onnx"]], 16)
    make_plan(checkpoint, recipe, [TARGETS["xnnpack"]], 16)


@pytest.mark.parametrize("head_dim", [8, 24])
def test_a_size_of_heads_without_a_kernel_is_refused(head_dim: int, tmp_path: Path) -> None:
    """ONNX Runtime loads such a model and fails in its first call. The portable form runs."""
    checkpoint, recipe = random_checkpoint(tmp_path / "model", {"head_dim": head_dim}), RECIPES["int8"]
    with pytest.raises(RecipeError, match=f"head_dim is {head_dim}, .* a multiple of 16") as refusal:
        make_plan(checkpoint, recipe, [TARGETS["onnx"]], 16)
    assert "portable" in refusal.value.remedy
    lowered(checkpoint, recipe, tmp_path / "ort", 16)
    with OrtRuntime(tmp_path / "ort") as runtime, pytest.raises(BundleError, match="head_size"):
        runtime.forward([1, 2, 3])
    portable = replace(recipe, name="mine", onnx_form="portable")
    make_plan(checkpoint, portable, [TARGETS["onnx"]], 16)
    lowered(checkpoint, portable, tmp_path / "portable", 16)
    with OrtRuntime(tmp_path / "portable") as runtime:
        assert np.isfinite(runtime.forward([1, 2, 3])).all()


@pytest.mark.parametrize(
    ("package", "module"),
    [("onnxruntime", "edgellama.runtimes.onnx"), ("onnx", "edgellama.export.onnx.lower")],
)
def test_a_missing_package_says_what_to_install(
    package: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reimported = (package, module, "edgellama.host.onnxruntime_library")
    for name in [name for name in sys.modules if name in reimported or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    load = opener_for if module.startswith("edgellama.runtimes") else lowering_for
    with pytest.raises(MissingDependencyError, match=r"pip install 'edgellama\[onnx\]'"):
        load(TARGETS["onnx"])


def test_inspect(onnx_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (onnx_bundle.path / "onnx", onnx_bundle.path / "onnx" / "model.onnx"):
        assert main(["inspect", str(path)]) == 0
        text = capsys.readouterr().out
        for words in ("past_key_values.*.key", "MatMulNBits", "com.microsoft", "int4", "edgellama.onnx form"):
            assert words in text


def test_run_on_the_command_line(onnx_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(onnx_bundle.path), "-t", "onnx", "-p", "The", "-n", "4"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_model_without_its_data_is_refused(onnx_bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "onnx"
    copy.mkdir()
    shutil.copy(onnx_bundle.path / "onnx" / "model.onnx", copy)
    with pytest.raises(BundleError, match="ONNX Runtime cannot load it"):
        OrtRuntime(copy)
    with pytest.raises(BundleError, match="no plain file beside it"):
        read_onnx(copy)


def test_a_calibrated_bundle_is_restored_from_its_own_codes(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Joined rows, repeated scales and the transposed layout all give back the codes from before lowering."""
    for form in FORMS:
        recipe = replace(RECIPES["int4"], name="mine", onnx_form=form, calibration_tokens=2048)
        bundle = export(
            tiny_checkpoint.first_layers(1),
            tmp_path / f"{form}.edgellama",
            targets=["onnx"],
            recipe=recipe,
            context=CONTEXT,
            validate=False,
        )
        model = restored_llama(bundle, TARGETS["onnx"])
        assert code_hashes(model) == json.loads((bundle.path / "reports/export.json").read_text())["codes"]
        again = examine_relowering(bundle, TARGETS["onnx"], model, Progress())
        assert [c.verdict for c in again.checks] == ["pass"], "the tied table is one tensor again"
