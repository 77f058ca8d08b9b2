"""Faults planted one at a time, each on its way to a file or a runtime, and the check that must find it by name.

The faulty artifact is lowered from a deliberately broken model and bundled by the production exporter, so what the
gate sees is a bundle that looks right from outside: its manifest, hashes and tokenizer are in order.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from edgellama.export.quantization import tensors as quantize
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.xnnpack import blocks as xnnpack_layers
from edgellama.export.xnnpack import lower as to_xnnpack
from edgellama.export.xnnpack import modules as xnnpack_modules
from edgellama.formats.pte import read_pte
from edgellama.gate import consistency
from edgellama.gate.structure import PROBES, check_tokenizer
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
from edgellama.text.windows import default_texts
from tests.helpers.tiny_models import CONTEXT, Cut, provenance, weight_of

RECIPE = RECIPES["int4-fast"]
UP_PROJ = "model.layers.0.mlp.up_proj"


@dataclass(frozen=True)
class Healthy:
    checkpoint: Checkpoint
    bundle: Bundle


@pytest.fixture(scope="module")
def healthy(cut: Callable[[int, str], Cut], tmp_path_factory: pytest.TempPathFactory) -> Healthy:
    """One layer, bundled with the file that other tests lowered too."""
    made, output = cut(1, RECIPE.name), tmp_path_factory.mktemp("healthy") / "cut.edgellama"

    def lower(model: Llama, path: Path, provenance: Provenance, *, progress: Progress) -> None:
        shutil.copy(made.path, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_xnnpack, "lower_to_xnnpack", lower)
        bundle = export(made.checkpoint, output, recipe=RECIPE, context=CONTEXT, validate=False)
    return Healthy(made.checkpoint, bundle)


def failed(bundle: Bundle, checkpoint: Checkpoint | None) -> dict[str, str]:
    """Name and detail of the checks that do not pass. The quality limit is out of the way: cuts are no models."""
    limit = None if checkpoint is None else 100.0
    report = validate(bundle, reference=checkpoint, tokens=256, max_kl=limit)
    return {c.name: c.detail for c in report.checks if c.verdict != "pass"}


def test_nothing_is_found_where_nothing_is_wrong(healthy: Healthy) -> None:
    assert failed(healthy.bundle, healthy.checkpoint) == {}
    assert failed(healthy.bundle, None) == {}


Damage = Callable[[Llama], None]
ExportBroken = Callable[..., Bundle]


@pytest.fixture
def export_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ExportBroken:
    """Export `checkpoint`, with a model that was damaged in between quantization and lowering."""

    def run(checkpoint: Checkpoint, damage: Damage) -> Bundle:
        lower = to_xnnpack.lower_to_xnnpack

        def lower_broken(model: Llama, path: Path, provenance: Provenance, *, progress: Progress) -> None:
            broken, _ = quantized_llama(checkpoint, RECIPE, CONTEXT)
            with torch.no_grad():
                damage(broken)
            lower(broken, path, provenance, progress=progress)

        monkeypatch.setattr(to_xnnpack, "lower_to_xnnpack", lower_broken)
        output = tmp_path / "broken.edgellama"
        bundle = export(checkpoint, output, recipe=RECIPE, context=CONTEXT, validate=False)
        monkeypatch.undo()  # the gate quantizes and runs with sound code
        return bundle

    return run


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
    damage: Damage, check: str, detail: str, healthy: Healthy, export_broken: ExportBroken
) -> None:
    found = failed(export_broken(healthy.checkpoint, damage), healthy.checkpoint)
    assert detail in found.get(check, ""), found


def test_a_layer_dropped(tiny_checkpoint: Checkpoint, export_broken: ExportBroken) -> None:
    def drop(model: Llama) -> None:
        del model.model.layers[1]

    checkpoint = tiny_checkpoint.first_layers(2)
    found = failed(export_broken(checkpoint, drop), checkpoint)
    assert "which hold 8 of the model's 15" in found.get("structure.schemes", ""), found
    assert "llama::update_cache.out called 2 times, expected 4" in found.get("structure.operators", "")


def test_rope_halves_swapped(
    healthy: Healthy, export_broken: ExportBroken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbouring pairs instead of halves: the file holds all the right numbers, so only running it tells."""

    def interleaved(
        self: xnnpack_layers.BeforeAttention, x: Tensor, heads: int, cos: Tensor, sin: Tensor
    ) -> Tensor:
        even, odd = (x.view(-1, heads, self.head_dim).view(-1, 2).narrow(-1, i, 1) for i in (0, 1))
        swapped = torch.cat((odd, even), -1).view(-1, heads, self.head_dim)
        return x.view(-1, heads, self.head_dim) * cos + swapped * sin

    def swap(model: Llama) -> None:
        monkeypatch.setattr(xnnpack_layers.BeforeAttention, "_rotate", interleaved)

    found = failed(export_broken(healthy.checkpoint, swap), healthy.checkpoint)
    assert "parity.kl" in found and "structure.codes" not in found, found


def test_scales_not_applied(healthy: Healthy, export_broken: ExportBroken) -> None:
    """What executorch 1.4.0's own partitioner makes of a weight-only linear: the codes, as float32 weights."""

    def multiply_by_codes(model: Llama) -> None:
        set_weight(model, weight_of(model, UP_PROJ).qdata.float())

    found = failed(export_broken(healthy.checkpoint, multiply_by_codes), healthy.checkpoint)
    assert "mlp.up_proj: expected int4 g32 with int8 activations" in found.get("structure.schemes", ""), found
    assert "parity.kl" in found


def test_values_not_kept(
    healthy: Healthy, export_broken: ExportBroken, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        torch.ops.llama.update_cache(k, self.k_cache, position)
        y: Tensor = torch.ops.llama.custom_sdpa(q, self.k_cache, self.v_cache, position, None, 0, True)
        return y

    def forget(model: Llama) -> None:
        monkeypatch.setattr(xnnpack_modules.ExecutorchCache, "forward", forward)

    found = failed(export_broken(healthy.checkpoint, forget), healthy.checkpoint)
    assert "llama::update_cache.out called 1 times, expected 2" in found.get("structure.operators", ""), found
    assert "parity.kl" in found


def test_a_prompt_that_sees_its_own_future(
    tiny_checkpoint: Checkpoint, export_broken: ExportBroken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the causal mask single steps are right, so parity cannot tell; prompts in one piece are wrong."""

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        torch.ops.llama.update_cache(k, self.k_cache, position)
        torch.ops.llama.update_cache(v, self.v_cache, position)
        y: Tensor = torch.ops.llama.custom_sdpa(q, self.k_cache, self.v_cache, position, None, 0, False)
        return y

    def look_ahead(model: Llama) -> None:
        monkeypatch.setattr(xnnpack_modules.ExecutorchCache, "forward", forward)

    checkpoint = tiny_checkpoint.first_layers(2)  # of one layer, only the last position is seen
    found = failed(export_broken(checkpoint, look_ahead), checkpoint)
    assert "consistency.prefill_decode" in found, found


def test_a_nonzero_zero_point(healthy: Healthy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = apply_codes

    def apply_asymmetric(model: Llama, name: str, codes: Codes) -> None:
        apply(model, name, codes)
        if name.endswith("down_proj"):
            weight_of(model, name).zero_point[0, 0] = 1

    monkeypatch.setattr(quantize, "apply_codes", apply_asymmetric)
    with pytest.raises(LoweringError, match=r"structure\.zero_points: .*layers\.0\.mlp\.down_proj"):
        export(healthy.checkpoint, tmp_path / "new.edgellama", recipe=RECIPE, context=CONTEXT)
    assert list(tmp_path.iterdir()) == []


def altered(bundle: Bundle, directory: Path, file: str, content: bytes, *, refresh: bool) -> Bundle:
    """A copy of the bundle with one file replaced; with `refresh` its manifest vouches for the new content."""
    copy = directory / "altered.edgellama"
    shutil.copytree(bundle.path, copy)
    (copy / file).write_bytes(content)
    if refresh:
        manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
        del manifest["files"]
        return write_manifest(copy, manifest)
    return Bundle.open(copy)


@pytest.mark.parametrize("position", [0.1, 0.5, 0.9])
def test_a_flipped_byte(position: float, healthy: Healthy, tmp_path: Path) -> None:
    content = bytearray((healthy.bundle.path / "xnnpack/model.pte").read_bytes())
    content[int(len(content) * position)] ^= 0x10
    bundle = altered(healthy.bundle, tmp_path, "xnnpack/model.pte", bytes(content), refresh=False)
    assert "xnnpack/model.pte is not the file that was exported" in failed(bundle, None)["structure.files"]
    found = failed(bundle, healthy.checkpoint)
    assert set(found) == {"structure.files"}, "what is not the exported file is not run"


@pytest.mark.parametrize(
    ("part", "check", "detail"),
    [
        ("codes", "structure.codes", "differ in model.layers.0.mlp.gate_proj"),
        ("scales", "structure.codes", "differ in model.layers.0.mlp.gate_proj"),
        ("embedding", "structure.constants", "missing or altered: model.embed_tokens codes"),
        ("RoPE", "structure.constants", "missing or altered: RoPE"),
    ],
)
def test_a_flipped_bit_that_the_manifest_vouches_for(
    part: str, check: str, detail: str, healthy: Healthy, tmp_path: Path
) -> None:
    path = healthy.bundle.path / "xnnpack/model.pte"
    content, pte = bytearray(path.read_bytes()), read_pte(path)
    constants = {c.shape: c.data for c in pte.constants}
    data = {
        "codes": pte.linears[2].data,
        "scales": pte.linears[2].scale_data,
        "embedding": constants[512, 128],
        "RoPE": constants[CONTEXT, 1, 32],
    }[part]
    content[bytes(content).index(data) + 100] ^= 1
    bundle = altered(healthy.bundle, tmp_path, "xnnpack/model.pte", bytes(content), refresh=True)
    found = failed(bundle, healthy.checkpoint)
    assert found.get(check, "").startswith(detail), found


def test_a_method_that_tells_runners_something_else(healthy: Healthy) -> None:
    model, _ = quantized_llama(healthy.checkpoint, RECIPE, CONTEXT)
    model.config = replace(model.config, eos_token_ids=(2, 0, 7))
    checks = {
        c.name: c for c in check_structure(healthy.bundle.artifact("xnnpack"), model, provenance(RECIPE))
    }
    assert checks["structure.metadata"].verdict == "fail"
    assert checks["structure.metadata"].detail == "get_eos_ids is [2, 0], expected [2, 0, 7]"


def test_a_header_that_the_manifest_vouches_for(healthy: Healthy, tmp_path: Path) -> None:
    content = bytearray((healthy.bundle.path / "xnnpack/model.pte").read_bytes())
    content[4:8] = b"ET99"
    bundle = altered(healthy.bundle, tmp_path, "xnnpack/model.pte", bytes(content), refresh=True)
    with pytest.raises(InputError, match=r"model\.pte"):
        validate(bundle, reference=healthy.checkpoint)


def test_a_tokenizer_with_one_merge_missing(healthy: Healthy, tmp_path: Path) -> None:
    source = json.loads(healthy.checkpoint.tokenizer.files["tokenizer.json"])
    source["model"]["merges"].pop()
    content = json.dumps(source).encode()
    bundle = altered(healthy.bundle, tmp_path, "tokenizer/tokenizer.json", content, refresh=True)
    assert "structure.tokenizer" in failed(bundle, healthy.checkpoint)


def test_a_merge_missing_that_no_text_here_needs(healthy: Healthy) -> None:
    """Someone's text will need it."""
    expected = healthy.checkpoint.tokenizer
    for index in reversed(range(250)):
        source = json.loads(expected.files["tokenizer.json"])
        source["model"]["merges"].pop(index)
        found = Tokenizer({"tokenizer.json": json.dumps(source).encode()})
        if all(found.encode(probe) == expected.encode(probe) for probe in PROBES):
            break
    else:
        pytest.fail("every merge is needed by a probe")
    assert check_tokenizer(found, expected, []).verdict == "fail"


def test_a_tokenizer_that_splits_in_another_way(healthy: Healthy) -> None:
    """The same vocabulary and merges behind another pre-tokenizer, as a GGUF conversion may leave them."""
    expected = healthy.checkpoint.tokenizer
    source = json.loads(expected.files["tokenizer.json"])
    digits, rest = source["pre_tokenizer"]["pretokenizers"]
    assert digits["type"] == "Digits"
    source["pre_tokenizer"] = rest
    found = Tokenizer({"tokenizer.json": json.dumps(source).encode()})
    answer = check_tokenizer(found, expected, default_texts())
    assert answer.verdict == "fail" and "other ids" in answer.detail


def test_a_stale_cache_after_reset(healthy: Healthy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reset that does not go back: new tokens join the old ones in the method's KV cache, while there is room."""
    reset, forward = PteRuntime.reset, PteRuntime._forward

    def stale_reset(self: Any) -> None:
        self.start = self.end
        reset(self)

    def appended(self: Any, tokens: Sequence[int], position: int) -> Logits:
        at = position + self.start
        at = at if at + len(tokens) <= self.context_length else position
        self.end = at + len(tokens)
        return forward(self, tokens, at)

    monkeypatch.setattr(PteRuntime, "start", 0, raising=False)
    monkeypatch.setattr(PteRuntime, "end", 0, raising=False)
    monkeypatch.setattr(PteRuntime, "reset", stale_reset)
    monkeypatch.setattr(PteRuntime, "_forward", appended)
    assert "consistency.reset" in failed(healthy.bundle, healthy.checkpoint)
    assert "consistency.reset" in failed(healthy.bundle, None)


class _Faulty(ReferenceRuntime):
    """A torch runtime with one fault, chosen by name."""

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

    def _check(self, tokens: Sequence[int]) -> None:
        if self.fault == "no end":
            return
        super()._check(tokens)


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
def test_a_faulty_runtime(fault: str, check: str | None, healthy: Healthy) -> None:
    runtime = _Faulty(load_llama(healthy.checkpoint, 100))
    runtime.fault = fault
    tokens = [(37 * i + 11) % 512 for i in range(64)]
    _, checks = consistency.measure_consistency(runtime, tokens, floor=1e-9)
    assert [c.name for c in checks if c.verdict != "pass"] == ([] if check is None else [check])
