"""Planted faults of given codes: in their reading and in the files, each found by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import edgellama
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.given import Given, gguf, layouts
from edgellama.checkpoints.weights import load_llama
from edgellama.commands.validate import validate
from edgellama.errors import InputError, UsageError
from edgellama.export.plan import make_plan
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.xnnpack import modules
from edgellama.formats import gguf_blocks
from edgellama.gate.weights import _check_given
from edgellama.model.quantized import Codes
from edgellama.recipe import RECIPES
from edgellama.targets import find_target
from edgellama.targets.xnnpack.structure import check_structure
from tests.helpers.quantized_models import (
    codes_by_hand,
    gguf_checkpoint,
    gptq_checkpoint,
    package_checkpoint,
)
from tests.helpers.tiny_models import CONTEXT, lower, provenance, write_hf

Q = "model.layers.0.self_attn.q_proj"
Plant = Callable[[pytest.MonkeyPatch], object]


def failures(checkpoint: Checkpoint) -> dict[str, str]:
    """Name and detail of the failed checks of weights."""
    recipe = make_plan(checkpoint, RECIPES["as-is"], [find_target("gguf")], CONTEXT).recipe
    model, _ = quantized_llama(checkpoint, recipe, CONTEXT)
    full = load_llama(checkpoint, CONTEXT)
    assert checkpoint.given is not None
    checks = _check_given(model, recipe, checkpoint.given, lambda name: full.get_parameter(name).detach())
    assert [c.name for c in checks] == [
        *("weights.codes", "weights.scales", "weights.reference", "weights.floats"),
    ]
    return {c.name: c.detail for c in checks if c.verdict != "pass"}


def other_nibbles(patch: pytest.MonkeyPatch) -> None:
    original = layouts.unpack_words

    def exchanged(words: Any, bits: int) -> Any:
        numbers = original(words, bits)
        return numbers.reshape(*numbers.shape[:-1], -1, 2).flip(-1).reshape(numbers.shape)

    patch.setattr(layouts, "unpack_words", exchanged)


def other_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layouts, "AWQ_POSITIONS", tuple(range(8)))


def zero_off_by_one(patch: pytest.MonkeyPatch) -> None:
    original = layouts.centred
    patch.setattr(layouts, "centred", lambda numbers, bits: original(numbers, bits) - 1)


def rounded_scale(patch: pytest.MonkeyPatch) -> None:
    def codes(self: Given, module: str) -> Codes:
        own = self.unpack(module)
        return replace(own, scales=(own.scales * 2**12).round() / 2**12)

    patch.setattr(Given, "codes", codes)


def rows_as_stored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gguf, "is_rotated", lambda name: False)


def other_halves(patch: pytest.MonkeyPatch) -> None:
    original = gguf_blocks.unpack

    def exchanged(kind: str, raw: Any, shape: Any) -> Any:
        values, scales = original(kind, raw, shape)
        return values.reshape(len(values), -1, 2, 16)[:, :, ::-1].reshape(values.shape).copy(), scales

    patch.setattr(gguf, "unpack", exchanged)


READERS: dict[str, tuple[str, Plant, set[str]]] = {
    "GPTQ, nibbles exchanged": ("auto_round", other_nibbles, {"weights.codes", "weights.reference"}),
    "GPTQ, zero point off by one": ("auto_round", zero_off_by_one, {"weights.codes", "weights.reference"}),
    "GPTQ, scales rounded": ("auto_round", rounded_scale, {"weights.scales", "weights.reference"}),
    "AWQ, order of columns ignored": ("awq", other_order, {"weights.codes", "weights.reference"}),
    "AWQ, zero point off by one": ("awq", zero_off_by_one, {"weights.codes", "weights.reference"}),
    "packed, nibbles exchanged": (
        "compressed_tensors",
        other_nibbles,
        {"weights.codes", "weights.reference"},
    ),
    "packed, scales rounded": ("compressed_tensors", rounded_scale, {"weights.scales", "weights.reference"}),
    "GGUF, rows of q in llama.cpp's order": ("Q4_0", rows_as_stored, {"weights.codes", "weights.scales"}),
    "GGUF, halves of a block exchanged": ("Q4_0", other_halves, {"weights.codes"}),
    "GGUF, scales rounded": ("Q4_0", rounded_scale, {"weights.scales"}),
}


def written(source: str, tiny: Checkpoint, path: Path) -> Path:
    if source == "Q4_0":
        kinds = {"model.embed_tokens": "Q8_0"}
        return gguf_checkpoint(path / "m.gguf", tiny.first_layers(1), kinds, "Q4_0")
    return package_checkpoint(path / source, source)


@pytest.mark.parametrize("source", ["auto_round", "awq", "compressed_tensors", "Q4_0"])
def test_sound_codes_pass(source: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert failures(open_checkpoint(written(source, tiny_checkpoint, tmp_path))) == {}


@pytest.mark.parametrize("name", READERS)
def test_a_fault_in_the_reading_is_found(
    name: str, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plant, expected = READERS[name]
    path = written(source, tiny_checkpoint, tmp_path)
    # A reader that is wrong about zero points would refuse the checkpoint before the gate sees it.
    monkeypatch.setattr(layouts, "_check_zeros", lambda *_: None)
    plant(monkeypatch)
    found = failures(open_checkpoint(path))
    assert found.keys() == expected
    assert all(re.search(r"not the|has other", d) and "model." in d for d in found.values())


def test_an_ignored_order_of_groups_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scattered(weights: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
        weights[f"{Q}.g_idx"] = weights[f"{Q}.g_idx"].flip(0).contiguous()

    monkeypatch.setattr(layouts, "_check_order", lambda *_: None)
    path = gptq_checkpoint(tmp_path / "model", codes_by_hand(32), edit=scattered)
    found = failures(open_checkpoint(path))
    assert found.keys() == {"weights.scales", "weights.reference"}
    assert Q in found["weights.scales"]


@pytest.mark.slow
def test_a_scale_without_its_second_is_found_in_the_pte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(gptq_checkpoint(tmp_path / "model", codes_by_hand(32)))
    recipe = make_plan(checkpoint, RECIPES["as-is"], [find_target("xnnpack")], CONTEXT).recipe

    def without_second(scales: Any, name: str, *, grouped: bool) -> None:
        return None

    monkeypatch.setattr(modules, "pair", without_second)
    cut = lower(checkpoint, recipe, tmp_path / "model.pte")
    monkeypatch.undo()
    found = {c.name: c.detail for c in check_structure(cut.path, cut.model, provenance(recipe))}
    assert "differ in" in found["structure.codes"]


@pytest.mark.slow
def test_a_bundle_is_judged_by_its_codes_and_measured_by_the_original(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    codes = package_checkpoint(tmp_path / "codes", "auto_round")
    original = write_hf(tiny_checkpoint.first_layers(1), tmp_path / "original")
    bundle = edgellama.export(codes, tmp_path / "b.edgellama", targets=["gguf"], recipe="as-is", context=64)
    assert bundle.manifest["source"]["codes"]["rounded"] == ["model.embed_tokens", "lm_head"]
    assert bundle.manifest["source"]["codes"]["taken"] == 7
    own = validate(bundle, reference=codes, tokens=512, relower=True)
    assert own.verdict == "pass", [c for c in own.checks if c.verdict != "pass"]
    loss = validate(bundle, reference=original, tokens=512)
    assert loss.verdict == "pass"
    assert loss.quality["kl_mean"] > 10 * own.quality["kl_mean"]
    assert not any(c.name.startswith(("parity", "weights")) for c in loss.checks)
    with pytest.raises(UsageError, match="so only quality can be measured"):
        validate(bundle, reference=original, layers=True)
    with pytest.raises(InputError, match="is not the model that"):
        validate(bundle, reference=tiny_checkpoint)
    limited = validate(bundle, reference=original, tokens=512, max_kl=1e-4)
    assert limited.verdict == "fail"
