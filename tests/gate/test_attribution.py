"""Tests of error attribution: deliberate damage is located by name, in the torch model and in the artifact."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, write_manifest
from edgellama.bundle.restore import code_hashes, quantized_modules, restored_llama
from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.checkpoints.weights import load_llama
from edgellama.cli.dispatch import main
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.errors import BundleError, LoweringError, MissingDependencyError, UsageError
from edgellama.export.lower import lowering_for
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.gate import attribution, bisection
from edgellama.gate.metrics import compare
from edgellama.host.progress import Progress
from edgellama.host.threads import workers
from edgellama.model.activations import INT8_PER_TOKEN
from edgellama.model.layerwise import run_layer
from edgellama.model.llama import Llama
from edgellama.recipe import RECIPES
from edgellama.targets import TARGETS, find_target
from edgellama.targets.provenance import Provenance
from edgellama.targets.xnnpack.numerics import xnnpack_numerics
from edgellama.text.windows import Window, default_texts, windows
from tests.helpers.paths import TINY
from tests.helpers.tiny_models import CONTEXT, provenance

pytestmark = pytest.mark.slow

RECIPE = RECIPES["int4-fast"]
CALIBRATED = replace(RECIPES["int4"], name="short", calibration_tokens=2048)


@pytest.fixture(scope="module")
def scored_windows(tiny_checkpoint: Checkpoint) -> list[Window]:
    return list(islice(windows(default_texts(), tiny_checkpoint.tokenizer, 32), 6))


@pytest.fixture(scope="module")
def float_model(tiny_checkpoint: Checkpoint) -> Llama:
    return load_llama(tiny_checkpoint, CONTEXT)


@pytest.fixture(scope="module")
def quantized_model(tiny_checkpoint: Checkpoint) -> Llama:
    return quantized_llama(tiny_checkpoint, RECIPE, CONTEXT)[0]


def test_the_total_equals_the_loss_of_the_models(
    float_model: Llama, quantized_model: Llama, tiny_checkpoint: Checkpoint, scored_windows: list[Window]
) -> None:
    """The total loss equals that of forward passes of the models. Without quantization it is 0."""
    section = attribution.attribute_error(
        StreamedLlama(tiny_checkpoint), quantized_model, RECIPE, scored_windows, rounding=INT8_PER_TOKEN
    )
    expected = []
    with torch.no_grad(), xnnpack_numerics(quantized_model):
        for window in scored_windows:
            tokens = torch.tensor(window.tokens)[None]
            expected.append(
                compare(float_model(tokens)[0], quantized_model(tokens)[0], window.targets).kl.mean()
            )
    assert section["split"]["all"]["kl"] == pytest.approx(sum(expected) / len(expected), rel=0.1)
    assert [p["part"] for p in section["parts"]] == [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(4)),
        "lm_head",
    ]
    for part in section["parts"]:
        low, high = part["kl_alone_ci95"]
        assert low <= part["kl_alone"] <= high and part["kl_alone"] >= 0
    assert "model.layers.3" in attribution.describe(section)
    unquantized = attribution.attribute_error(
        StreamedLlama(tiny_checkpoint), float_model, RECIPES["fp32"], scored_windows, rounding=INT8_PER_TOKEN
    )
    assert all(abs(p["kl_alone"]) < 1e-9 and p["sqnr_db"] is None for p in unquantized["parts"])


@pytest.mark.parametrize("damaged", [1, 3])
def test_a_damaged_layer_is_located(
    damaged: int, tiny_checkpoint: Checkpoint, scored_windows: list[Window]
) -> None:
    broken, _ = quantized_llama(tiny_checkpoint, RECIPE, CONTEXT)
    weight = broken.get_submodule(f"model.layers.{damaged}.mlp.up_proj").weight
    weight.scale.mul_(1.5)  # type: ignore[operator,union-attr]
    section = attribution.attribute_error(
        StreamedLlama(tiny_checkpoint), broken, RECIPE, scored_windows, rounding=INT8_PER_TOKEN
    )
    assert attribution.worst(section) == f"model.layers.{damaged}"
    gains = {p["part"]: p["kl_restored"] for p in section["parts"]}
    assert max(gains, key=lambda name: gains[name]) == f"model.layers.{damaged}"
    curve = [p["sqnr_db"] for p in section["parts"][:-1]]
    drops = [before - after for before, after in pairwise(curve[1:])]
    assert drops.index(max(drops)) == damaged - 1


def test_run_layer_equals_the_model(float_model: Llama, scored_windows: list[Window]) -> None:
    states = [float_model.model.embed_tokens(torch.tensor(w.tokens)) for w in scored_windows[:2]]
    expected = [float_model.model(torch.tensor(w.tokens)[None], 0)[0] for w in scored_windows[:2]]
    with workers() as pool:
        for layer in float_model.model.layers:
            states = run_layer(layer, states, float_model.config, {}, pool, lambda *_: None)  # type: ignore[arg-type]
    for actual_state, expected_state in zip(states, expected, strict=True):
        torch.testing.assert_close(actual_state, expected_state, rtol=1e-4, atol=1e-4)


def test_a_parity_failure_is_traced_to_its_layer(
    tiny_checkpoint: Checkpoint, scored_windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The torch model stands in for lowered cuts. Its layer 2 has a wrong epsilon."""
    model, _ = quantized_llama(tiny_checkpoint, RECIPE, CONTEXT)
    lowered: list[int] = []

    def record_cut(cut: Llama, path: Path, provenance: Provenance, *, progress: Progress) -> None:
        lowered.append(cut.config.num_hidden_layers)

    class TorchRuntime:
        def __init__(self, path: Path) -> None:
            self.cut = bisection.first_layers(model, lowered[-1])
            self.tokens: list[int] = []

        def reset(self) -> None:
            self.tokens = []

        def forward(self, tokens: list[int]) -> object:
            self.tokens += tokens
            broken = self.cut.config.num_hidden_layers > 2
            norm = model.get_submodule("model.layers.2.input_layernorm")
            eps, norm.eps = norm.eps, 3.0 if broken else norm.eps  # type: ignore[assignment]
            try:
                with torch.no_grad(), xnnpack_numerics(self.cut):
                    return self.cut(torch.tensor(self.tokens)[None])[0, -1].numpy()
            finally:
                norm.eps = eps

        def close(self) -> None:
            pass

    monkeypatch.setattr(bisection, "lowering_for", lambda target: record_cut)
    monkeypatch.setattr(bisection, "open_runtime", lambda target, path: TorchRuntime(path))
    target = find_target("xnnpack")
    layer = bisection.first_bad_layer(model, target, provenance(RECIPE), scored_windows[:1], Progress())
    assert layer == 2
    assert set(lowered) <= {2, 3, 4}


@pytest.mark.parametrize("damaged", [0, 2])
def test_a_layer_damaged_in_the_artifact_is_located_by_lowering_cuts(
    damaged: int, tiny_checkpoint: Checkpoint, scored_windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cuts are lowered to files and run by ExecuTorch. Lowering makes the scales of one linear 3 % too large."""
    model, _ = quantized_llama(tiny_checkpoint.first_layers(3), RECIPE, CONTEXT)
    target, lowered = find_target("xnnpack"), []

    def lower_damaged(cut: Llama, path: Path, provenance: Provenance, *, progress: Progress) -> None:
        lowered.append(cut.config.num_hidden_layers)
        broken = copy.deepcopy(cut)
        if lowered[-1] > damaged:
            weight = broken.get_submodule(f"model.layers.{damaged}.self_attn.o_proj").weight
            weight.scale.copy_((weight.scale * 1.03).to(torch.bfloat16))  # type: ignore[operator,union-attr]
        lowering_for(target)(broken, path, provenance, progress=progress)

    monkeypatch.setattr(bisection, "lowering_for", lambda target: lower_damaged)
    assert (
        bisection.first_bad_layer(model, target, provenance(RECIPE), scored_windows[:2], Progress())
        == damaged
    )
    assert max(lowered) < 4 and len(lowered) == 2


@pytest.fixture(scope="module")
def calibrated_bundle(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One calibrated layer, exported for two formats. Read-only."""
    output = tmp_path_factory.mktemp("calibrated") / "cut.edgellama"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(output.parent / "cache"))
        bundle = export(
            tiny_checkpoint.first_layers(1),
            output,
            targets=["xnnpack", "coreml"],
            recipe=CALIBRATED,
            context=CONTEXT,
            max_kl=5,
        )
    assert not any((output.parent / "cache").rglob("*.safetensors"))
    return bundle


@pytest.mark.parametrize("name", ["xnnpack", "coreml"])
def test_a_calibrated_model_is_restored_from_its_artifact(
    name: str, calibrated_bundle: Bundle, tiny_checkpoint: Checkpoint
) -> None:
    """Codes, scales and norms equal those of quantization bit for bit, from both formats."""
    restored = restored_llama(calibrated_bundle, TARGETS[name])
    expected, _ = quantized_llama(tiny_checkpoint.first_layers(1), CALIBRATED, CONTEXT)
    assert code_hashes(restored) == code_hashes(expected)
    assert len(list(quantized_modules(restored))) == 9
    expected_parameters = dict(expected.named_parameters())
    actual_parameters = dict(restored.named_parameters())
    assert list(actual_parameters) == list(expected_parameters)
    for parameter_name, parameter in actual_parameters.items():
        assert parameter.dim() != 1 or torch.equal(parameter, expected_parameters[parameter_name])


def test_the_report_of_a_calibrated_export(calibrated_bundle: Bundle) -> None:
    data = json.loads((calibrated_bundle.path / "reports/export.json").read_text())
    assert data["calibration"]["tokens"] == 2048
    assert {text["name"] for text in data["calibration"]["texts"]} == {
        "calibration_emma",
        "calibration_python_tutorial",
    }
    assert len(data["codes"]) == 9
    assert not calibrated_bundle.problems()


def test_codes_that_changed_after_quantization_are_named(
    calibrated_bundle: Bundle, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The artifact and its hash in the manifest are altered. Only the record of quantization reveals it."""
    path = tmp_path / "cut.edgellama"
    shutil.copytree(calibrated_bundle.path, path)
    bundle = Bundle.open(path)
    values = dict(quantized_modules(restored_llama(bundle, TARGETS["xnnpack"])))[
        "model.layers.0.self_attn.o_proj"
    ].values
    packed = (values[:, ::2] + 8 | (values[:, 1::2] + 8) << 4).to(torch.uint8).numpy().tobytes()
    content = bundle.artifact("xnnpack").read_bytes()
    offset = content.find(packed)
    assert offset > 0
    altered = bytearray(content)
    altered[offset] ^= 0x11
    bundle.artifact("xnnpack").write_bytes(bytes(altered))
    manifest = json.loads((path / MANIFEST).read_text())
    bundle = write_manifest(path, {k: v for k, v in manifest.items() if k not in ("schema", "files")})
    with pytest.raises(LoweringError, match=r"model\.layers\.0\.self_attn\.o_proj"):
        restored_llama(bundle, TARGETS["xnnpack"])
    report = validate(bundle, reference=tiny_checkpoint.first_layers(1), target="xnnpack")
    assert report.verdict == "fail"
    (codes,) = (c for c in report.checks if c.name == "structure.codes")
    assert "o_proj" in codes.detail


def test_a_calibrated_bundle_without_its_floats_is_refused(calibrated_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "cut.edgellama"
    shutil.copytree(calibrated_bundle.path, path)
    (path / "reports/floats.safetensors").unlink()
    with pytest.raises(BundleError, match=r"floats\.safetensors"):
        restored_llama(Bundle.open(path), TARGETS["xnnpack"])


def test_validate_layers_on_the_command_line(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    plot, report = tmp_path / "layers.svg", tmp_path / "report.json"
    options = ["--reference", str(TINY), "--tokens", "512", "--layers-plot", str(plot), "--json", str(report)]
    assert main(["validate", str(tiny_bundle.path), *options]) == 0
    out = capsys.readouterr().out
    for word in ("weights", "activations", "lowering", "model.layers.3", "KL won by restoring it"):
        assert word in out
    section = json.loads(report.read_text())["layers"]
    split = {name: part["kl"] for name, part in section["split"].items()}
    assert split["all"] == pytest.approx(split["weights"] + split["activations"] + split["lowering"])
    assert plot.read_text().count("<svg") == 1


def test_layers_need_a_reference_and_a_plot_a_known_name(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without a reference"):
        validate(tiny_bundle, layers=True)
    try:
        code = main(["validate", str(tiny_bundle.path), "--layers-plot", str(tmp_path / "x.bmp")])
    except MissingDependencyError:
        pytest.skip("no matplotlib")
    assert code == 2
