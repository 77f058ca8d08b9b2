"""Tests of the gate with planted faults: each fault must be detected by the check that is named for it.

Faulty artifacts are lowered from deliberately broken models and bundled by the production exporter. So the manifest,
the hashes and the tokenizer of a faulty bundle are correct.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, write_manifest
from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.errors import InputError, LoweringError
from edgellama.export.quantization import tensors
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.xnnpack import blocks, lower, modules
from edgellama.formats.pte import read_pte
from edgellama.gate import consistency
from edgellama.gate.copies import check_tokenizer
from edgellama.gate.long_window import run_long
from edgellama.gate.noise import Noise
from edgellama.gate.structure import PROBES
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama, RMSNorm
from edgellama.model.quantized import Codes, apply_codes
from edgellama.recipe import RECIPES
from edgellama.runtimes.base import Logits
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.runtimes.xnnpack import PteRuntime
from edgellama.targets.provenance import Provenance
from edgellama.targets.xnnpack.structure import check_structure
from edgellama.text.tokenizer import Tokenizer
from tests.helpers.one_layer_bundle import Sound
from tests.helpers.tiny_models import CONTEXT, provenance, weight_of

pytestmark = pytest.mark.slow

RECIPE = RECIPES["int4-fast"]
UP_PROJ = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def healthy_artifact(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    one_layer, output = tiny_checkpoint.first_layers(1), tmp_path_factory.mktemp("healthy") / "cut.edgellama"
    bundle = export(one_layer, output, recipe=RECIPE, context=CONTEXT, validate=False)
    return Sound(one_layer, bundle)


def failed_checks(bundle: Bundle, checkpoint: Checkpoint | None) -> dict[str, str]:
    """Name and detail of the checks that do not pass.

    The limit of KL is too high to matter, because cuts of a model predict badly.
    """
    limit = None if checkpoint is None else 100.0
    report = validate(bundle, reference=checkpoint, tokens=256, max_kl=limit, relower=False)
    return {c.name: c.detail for c in report.checks if c.verdict != "pass"}


def test_a_healthy_artifact_passes_every_check(healthy_artifact: Sound) -> None:
    assert failed_checks(healthy_artifact.bundle, healthy_artifact.checkpoint) == {}
    assert failed_checks(healthy_artifact.bundle, None) == {}


Damage = Callable[[Llama], None]
ExportBroken = Callable[..., Bundle]


@pytest.fixture
def export_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ExportBroken:
    """`export_broken(checkpoint, damage)`: exports a model that is damaged after quantization."""

    def export_damaged(checkpoint: Checkpoint, damage: Damage) -> Bundle:
        lower_to_xnnpack = lower.lower_to_xnnpack

        def lower_broken(model: Llama, path: Path, provenance: Provenance, *, progress: Progress) -> None:
            broken, _ = quantized_llama(checkpoint, RECIPE, CONTEXT)
            with torch.no_grad():
                damage(broken)
            lower_to_xnnpack(broken, path, provenance, progress=progress)

        monkeypatch.setattr(lower, "lower_to_xnnpack", lower_broken)
        output = tmp_path / "broken.edgellama"
        bundle = export(checkpoint, output, recipe=RECIPE, context=CONTEXT, validate=False)
        monkeypatch.undo()  # the gate quantizes and runs with sound code
        return bundle

    return export_damaged


def set_weight(model: Llama, weight: Tensor) -> None:
    model.get_submodule(UP_PROJ).weight = nn.Parameter(weight, requires_grad=False)


def leave_in_float(model: Llama) -> None:
    set_weight(model, weight_of(model, UP_PROJ).dequantize())


def alter_a_scale(model: Llama) -> None:
    scale = weight_of(model, UP_PROJ).scale
    scale[7, 2] = (scale[7, 2].bfloat16().view(torch.int16) + 1).view(torch.bfloat16)


def alter_a_norm_by_one_ulp(model: Llama) -> None:
    weight = weight_of(model, "model.layers.0.post_attention_layernorm")
    weight[5] = torch.nextafter(weight[5], torch.tensor(torch.inf))


def alter_the_epsilon(model: Llama) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-6


@pytest.mark.parametrize(
    ("damage", "check", "detail"),
    [
        (
            leave_in_float,
            "structure.schemes",
            "layers.0.mlp.up_proj: expected int4 g32 with int8 activations [352, 128], found float32 [352, 128]",
        ),
        (alter_a_scale, "structure.codes", "differ in model.layers.0.mlp.up_proj"),
        (alter_a_norm_by_one_ulp, "structure.constants", "model.layers.0.post_attention_layernorm"),
        (alter_the_epsilon, "structure.norms", "layernorm"),
    ],
)
def test_a_broken_model(
    damage: Damage, check: str, detail: str, healthy_artifact: Sound, export_broken: ExportBroken
) -> None:
    failures = failed_checks(export_broken(healthy_artifact.checkpoint, damage), healthy_artifact.checkpoint)
    assert detail in failures.get(check, ""), failures


def test_a_dropped_layer(tiny_checkpoint: Checkpoint, export_broken: ExportBroken) -> None:
    def drop(model: Llama) -> None:
        del model.model.layers[1]

    checkpoint = tiny_checkpoint.first_layers(2)
    failures = failed_checks(export_broken(checkpoint, drop), checkpoint)
    assert "which hold 8 of the model's 15" in failures.get("structure.schemes", ""), failures
    assert "llama::update_cache.out called 2 times, expected 4" in failures.get("structure.operators", "")


def test_swapped_rope_halves(
    healthy_artifact: Sound, export_broken: ExportBroken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbouring pairs instead of halves. The numbers in the file are correct, so only a run detects it."""

    def interleaved(self: blocks.BeforeAttention, x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = (x.view(-1, heads, self.head_dim).view(-1, 2).narrow(-1, i, 1) for i in (0, 1))
        swapped = torch.cat((odd, even), -1).view(-1, heads, self.head_dim)
        return x.view(-1, heads, self.head_dim) * cos + swapped * sin

    def swap(model: Llama) -> None:
        monkeypatch.setattr(blocks.BeforeAttention, "_rotate", interleaved)

    failures = failed_checks(export_broken(healthy_artifact.checkpoint, swap), healthy_artifact.checkpoint)
    assert "parity.kl" in failures and "structure.codes" not in failures, failures


def test_missing_scales(healthy_artifact: Sound, export_broken: ExportBroken) -> None:
    """Codes as float32 weights, as the partitioner of executorch 1.4.0 lowers a weight-only linear."""

    def multiply_by_codes(model: Llama) -> None:
        set_weight(model, weight_of(model, UP_PROJ).qdata.float())

    failures = failed_checks(
        export_broken(healthy_artifact.checkpoint, multiply_by_codes), healthy_artifact.checkpoint
    )
    assert "mlp.up_proj: expected int4 g32 with int8 activations" in failures.get("structure.schemes", ""), (
        failures
    )
    assert "parity.kl" in failures


def test_values_missing_from_the_kv_cache(
    healthy_artifact: Sound, export_broken: ExportBroken, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        torch.ops.llama.update_cache(k, self.k_cache, position)
        y: Tensor = torch.ops.llama.custom_sdpa(q, self.k_cache, self.v_cache, position, None, 0, True)
        return y

    def forget(model: Llama) -> None:
        monkeypatch.setattr(modules.ExecutorchCache, "forward", forward)

    failures = failed_checks(export_broken(healthy_artifact.checkpoint, forget), healthy_artifact.checkpoint)
    assert "llama::update_cache.out called 1 times, expected 2" in failures.get("structure.operators", ""), (
        failures
    )
    assert "parity.kl" in failures


def test_a_missing_causal_mask(
    tiny_checkpoint: Checkpoint, export_broken: ExportBroken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the mask single steps are correct, so parity does not detect it. Prefill is wrong."""

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        torch.ops.llama.update_cache(k, self.k_cache, position)
        torch.ops.llama.update_cache(v, self.v_cache, position)
        y: Tensor = torch.ops.llama.custom_sdpa(q, self.k_cache, self.v_cache, position, None, 0, False)
        return y

    def look_ahead(model: Llama) -> None:
        monkeypatch.setattr(modules.ExecutorchCache, "forward", forward)

    checkpoint = tiny_checkpoint.first_layers(2)  # with one layer, only the last position matters
    failures = failed_checks(export_broken(checkpoint, look_ahead), checkpoint)
    assert "consistency.prefill_decode" in failures, failures


def test_a_nonzero_zero_point(
    healthy_artifact: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apply_asymmetric(model: Llama, name: str, codes: Codes) -> None:
        apply_codes(model, name, codes)
        if name.endswith("down_proj"):
            weight_of(model, name).zero_point[0, 0] = 1

    monkeypatch.setattr(tensors, "apply_codes", apply_asymmetric)
    with pytest.raises(LoweringError, match=r"structure\.zero_points: .*layers\.0\.mlp\.down_proj"):
        export(healthy_artifact.checkpoint, tmp_path / "new.edgellama", recipe=RECIPE, context=CONTEXT)
    assert list(tmp_path.iterdir()) == []


def altered(bundle: Bundle, directory: Path, file: str, content: bytes, *, refresh: bool) -> Bundle:
    """A copy of the bundle with one file replaced. With `refresh` the manifest has the new hash."""
    copy = directory / "altered.edgellama"
    shutil.copytree(bundle.path, copy)
    (copy / file).write_bytes(content)
    if refresh:
        manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
        del manifest["files"]
        return write_manifest(copy, manifest)
    return Bundle.open(copy)


@pytest.mark.parametrize("position", [0.1, 0.5, 0.9])
def test_a_flipped_byte(position: float, healthy_artifact: Sound, tmp_path: Path) -> None:
    content = bytearray((healthy_artifact.bundle.path / "xnnpack/model.pte").read_bytes())
    content[int(len(content) * position)] ^= 0x10
    bundle = altered(healthy_artifact.bundle, tmp_path, "xnnpack/model.pte", bytes(content), refresh=False)
    assert (
        "xnnpack/model.pte is not the file that was exported"
        in failed_checks(bundle, None)["structure.files"]
    )
    failures = failed_checks(bundle, healthy_artifact.checkpoint)
    assert set(failures) == {"structure.files"}, "a file that was not exported is not run"


@pytest.mark.parametrize(
    ("part", "check", "detail"),
    [
        ("codes", "structure.codes", "differ in model.layers.0.mlp.gate_proj"),
        ("scales", "structure.codes", "differ in model.layers.0.mlp.gate_proj"),
        ("embedding", "structure.constants", "missing or altered: model.embed_tokens codes"),
        ("RoPE", "structure.constants", "missing or altered: RoPE"),
    ],
)
def test_a_flipped_bit_with_a_matching_manifest(
    part: str, check: str, detail: str, healthy_artifact: Sound, tmp_path: Path
) -> None:
    path = healthy_artifact.bundle.path / "xnnpack/model.pte"
    content, pte = bytearray(path.read_bytes()), read_pte(path)
    constants = {c.shape: c.data for c in pte.constants}
    data = {
        "codes": pte.linears[2].data,
        "scales": pte.linears[2].scale_data,
        "embedding": constants[512, 128],
        "RoPE": constants[CONTEXT, 1, 32],
    }[part]
    content[bytes(content).index(bytes(data)) + 100] ^= 1
    bundle = altered(healthy_artifact.bundle, tmp_path, "xnnpack/model.pte", bytes(content), refresh=True)
    failures = failed_checks(bundle, healthy_artifact.checkpoint)
    assert failures.get(check, "").startswith(detail), failures


def test_a_method_with_wrong_metadata(healthy_artifact: Sound) -> None:
    model, _ = quantized_llama(healthy_artifact.checkpoint, RECIPE, CONTEXT)
    model.config = replace(model.config, eos_token_ids=(2, 0, 7))
    checks = check_structure(healthy_artifact.bundle.artifact("xnnpack"), model, provenance(RECIPE))
    (metadata,) = (c for c in checks if c.name == "structure.metadata")
    assert metadata.verdict == "fail"
    assert metadata.detail.startswith("get_eos_ids is [2, 0], expected [2, 0, 7]")


def test_a_wrong_header_with_a_matching_manifest(healthy_artifact: Sound, tmp_path: Path) -> None:
    content = bytearray((healthy_artifact.bundle.path / "xnnpack/model.pte").read_bytes())
    content[4:8] = b"ET99"
    bundle = altered(healthy_artifact.bundle, tmp_path, "xnnpack/model.pte", bytes(content), refresh=True)
    with pytest.raises(InputError, match=r"model\.pte"):
        validate(bundle, reference=healthy_artifact.checkpoint)


def test_a_tokenizer_without_one_merge(healthy_artifact: Sound, tmp_path: Path) -> None:
    source = json.loads(healthy_artifact.checkpoint.tokenizer.files["tokenizer.json"])
    source["model"]["merges"].pop()
    content = json.dumps(source).encode()
    bundle = altered(healthy_artifact.bundle, tmp_path, "tokenizer/tokenizer.json", content, refresh=True)
    assert "structure.tokenizer" in failed_checks(bundle, healthy_artifact.checkpoint)


def test_a_missing_merge_that_no_probe_needs(healthy_artifact: Sound) -> None:
    """The probes do not need the merge, but other texts do."""
    expected = healthy_artifact.checkpoint.tokenizer
    for index in reversed(range(250)):
        source = json.loads(expected.files["tokenizer.json"])
        source["model"]["merges"].pop(index)
        damaged = Tokenizer({"tokenizer.json": json.dumps(source).encode()})
        if all(damaged.encode(probe) == expected.encode(probe) for probe in PROBES):
            break
    else:
        pytest.fail("every merge is needed by a probe")
    assert check_tokenizer(damaged.files, expected.files).verdict == "fail"


def test_a_tokenizer_with_another_pre_tokenizer(healthy_artifact: Sound) -> None:
    """The same vocabulary and merges with another pre-tokenizer, as after a faulty conversion to GGUF."""
    expected = healthy_artifact.checkpoint.tokenizer
    source = json.loads(expected.files["tokenizer.json"])
    digits, rest = source["pre_tokenizer"]["pretokenizers"]
    assert digits["type"] == "Digits"
    source["pre_tokenizer"] = rest
    damaged = Tokenizer({"tokenizer.json": json.dumps(source).encode()})
    check = check_tokenizer(damaged.files, expected.files)
    assert check.verdict == "fail" and check.detail == "tokenizer.json differs in pre_tokenizer"


def test_a_stale_cache_after_reset(healthy_artifact: Sound, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reset keeps the position, so new tokens follow the old ones in the KV cache while there is room."""
    reset, forward = PteRuntime.reset, PteRuntime._forward

    def stale_reset(self: Any) -> None:
        self.start = self.end
        reset(self)

    def appended(self: Any, tokens: Sequence[int], position: int) -> Logits:
        shifted = position + self.start
        shifted = shifted if shifted + len(tokens) <= self.context_length else position
        self.end = shifted + len(tokens)
        return forward(self, tokens, shifted)

    monkeypatch.setattr(PteRuntime, "start", 0, raising=False)
    monkeypatch.setattr(PteRuntime, "end", 0, raising=False)
    monkeypatch.setattr(PteRuntime, "reset", stale_reset)
    monkeypatch.setattr(PteRuntime, "_forward", appended)
    assert "consistency.reset" in failed_checks(healthy_artifact.bundle, healthy_artifact.checkpoint)
    assert "consistency.reset" in failed_checks(healthy_artifact.bundle, None)


class FaultyRuntime(ReferenceRuntime):
    """A torch runtime with one fault, chosen by its name."""

    fault = "none"

    def _forward(self, tokens: Sequence[int], position: int) -> Logits:
        if self.fault == "chunks start over" and position and len(tokens) > 1:
            position = 0
        if self.fault == "the end wraps" and position == self.context_length - 1:
            position = 0
        if self.fault == "no end":
            position = min(position, self.context_length - len(tokens))
        if self.fault == "prompts lose a token" and len(tokens) == 63:
            tokens = tokens[:-1]
        return super()._forward(tokens, position)

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        return list(tokens) if self.fault == "no end" else super()._checked(tokens)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("none", None),
        ("chunks start over", "consistency.chunked_prefill"),
        ("the end wraps", "consistency.last_position"),
        ("prompts lose a token", "consistency.prefill_decode"),
        ("no end", "consistency.context_overflow"),
    ],
)
def test_a_faulty_runtime(fault: str, check: str | None, healthy_artifact: Sound) -> None:
    runtime = FaultyRuntime(load_llama(healthy_artifact.checkpoint, 100))
    runtime.fault = fault
    tokens = [(37 * i + 11) % 512 for i in range(runtime.context_length)]
    run, noise = run_long(runtime, tokens), Noise(1e-9, 1e-9)
    _, checks = consistency.measure_consistency(runtime, tokens, noise=noise)
    checks += consistency.examine_end(runtime, run, noise=noise, always_passes=1e-4).checks
    failed = {c.name for c in checks if c.verdict != "pass"}
    assert (check in failed) if check is not None else (failed == set())
