"""Planted faults of adapters, each found by name.

The file of an adapter is written again under the fault, and the gate runs under it too: a defect of edgellama would be
in both.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import write_manifest
from edgellama.bundle.restore import restored_llama
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.adapters import merge, swappable
from edgellama.checkpoints.adapters.adapter import Adapter, LowRank
from edgellama.checkpoints.adapters.swappable import open_swappable
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.errors import InputError
from edgellama.export.lower import write_adapter
from edgellama.export.quantization.adapter_basis import AdapterBasis
from edgellama.gate.references import References
from edgellama.model.adapted import Pair, Pairs
from edgellama.model.llama import Llama
from edgellama.recipe import RECIPES
from edgellama.targets import find_target
from edgellama.targets.gguf import adapters as gguf_adapters
from tests.helpers.adapters import Q0, adapter_of_all, matrices
from tests.helpers.adapters import write_adapter as write_peft
from tests.helpers.paths import TINY
from tests.helpers.tiny_models import write_hf

pytestmark = pytest.mark.slow

RECIPE = replace(RECIPES["int4"], name="ours", algorithm="gptq", rotation="values", calibration_tokens=2048)
Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Sound:
    """A bundle of one layer with the adapter `style`, folded and rotated, its base, and its quantized model."""

    checkpoint: Checkpoint
    adapter: Path
    bundle: Bundle
    model: Llama


@pytest.fixture(scope="module")
def sound(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    directory = tmp_path_factory.mktemp("faults")
    checkpoint = tiny_checkpoint.first_layers(1)
    adapter = adapter_of_all(checkpoint, directory / "peft", size=0.01)
    bundle = export(
        checkpoint,
        directory / "sound.edgellama",
        recipe=RECIPE,
        targets=("onnx", "gguf"),
        context=32,
        swappable_adapters={"style": adapter},
        validate=False,
    )
    return Sound(checkpoint, adapter, bundle, restored_llama(bundle, find_target("gguf")))


def failures(bundle: Bundle, sound: Sound, target: str) -> Mapping[str, str]:
    """Name and detail of the checks of adapters that fail."""
    report = validate(
        bundle,
        reference=sound.checkpoint,
        target=target,
        tokens=256,
        max_kl=100.0,
        references=References.of(sound.checkpoint, sound.model),
        relower=False,
        swappable_adapters={"style": sound.adapter},
    )
    return {c.name: c.detail for c in report.checks if c.verdict != "pass" and c.name.startswith("adapters.")}


def written_again(sound: Sound, target: str, directory: Path, *, other_base: bool = False) -> Bundle:
    """A copy of the bundle, whose adapter is written again by the code as it is now."""
    copy = directory / "altered.edgellama"
    shutil.copytree(sound.bundle.path, copy)
    wanted = find_target(target)
    provenance = wanted.provenance(sound.bundle.manifest)
    if other_base:
        provenance = replace(provenance, manifest_sha256="c" * 64)
    pairs = open_swappable(sound.checkpoint, sound.adapter).pairs()
    moved = AdapterBasis(sound.checkpoint, RECIPE.rotation, sound.model).moved(pairs)
    planned = wanted.planned_adapter(moved, sound.model.config, provenance)
    (copy / "adapters" / f"style{wanted.adapter_ending}").unlink()
    write_adapter(wanted, planned, copy / "adapters" / f"style{wanted.adapter_ending}")
    return write_manifest(copy, sound.bundle.manifest)


def not_folded(patch: Patch) -> None:
    patch.setattr(
        AdapterBasis, "moved", lambda self, pairs: {n: _only_rotated(self, n, p) for n, p in pairs.items()}
    )


def _only_rotated(basis: AdapterBasis, name: str, pair: Pair) -> Pair:
    assert basis._sides is not None
    down, up = (
        side(f"{name}.weight", x)
        for side, x in ((basis._sides.columns, pair.down), (basis._sides.rows, pair.up))
    )
    return Pair(down, up.contiguous())


def not_rotated(patch: Patch) -> None:
    moved = AdapterBasis.moved

    def without(self: AdapterBasis, pairs: Pairs) -> dict[str, Pair]:
        patch.setattr(self, "_sides", None)
        return moved(self, pairs)

    patch.setattr(AdapterBasis, "moved", without)


def not_permuted(patch: Patch) -> None:
    patch.setattr(gguf_adapters, "permute", lambda weight, head_dim: weight)


def scaled(factor: Callable[[LowRank], float]) -> Callable[[Patch], None]:
    def pairs(adapter: Adapter) -> dict[str, Pair]:
        changes = adapter.changes.items()
        return {n.removesuffix(".weight"): Pair(c.down, factor(c) * c.scale * c.up) for n, c in changes}

    return lambda patch: patch.setattr(swappable, "pairs_of", pairs)


FAULTS: dict[str, tuple[Callable[[Patch], None], str, str, str]] = {
    "not folded": (not_folded, "onnx", "adapters.style.function", "in float32"),
    "not rotated": (not_rotated, "onnx", "adapters.style.function", "in float32"),
    "not permuted": (not_permuted, "gguf", "adapters.style.parity_kl", "noise floor"),
    "alpha for alpha / r": (scaled(lambda c: c.rank), "onnx", "adapters.style.function", "in float32"),
    "rsLoRA taken for LoRA": (
        scaled(lambda c: c.rank**-0.5),
        "gguf",
        "adapters.style.function",
        "in float32",
    ),
}


def test_a_sound_bundle(sound: Sound) -> None:
    assert failures(sound.bundle, sound, "onnx") == {} == failures(sound.bundle, sound, "gguf")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_export_and_gate_alike(
    name: str, sound: Sound, tmp_path: Path, monkeypatch: Patch
) -> None:
    plant, target, check, detail = FAULTS[name]
    plant(monkeypatch)
    found = failures(written_again(sound, target, tmp_path), sound, target)
    assert detail in found.get(check, ""), found


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_file_alone(name: str, sound: Sound, tmp_path: Path) -> None:
    """The same faults, made by something else than this edgellama."""
    plant, target, _, _ = FAULTS[name]
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        bundle = written_again(sound, target, tmp_path)
    assert "has other values" in failures(bundle, sound, target).get("adapters.style.file", "")


def test_folds_that_are_not_those_of_the_codes(sound: Sound, tmp_path: Path) -> None:
    """Base and adapter agree with each other in float32, and not with the codes."""
    folds, up = sound.model.folds, "model.layers.0.mlp.up_proj"
    sound.model.folds = folds | {up: folds[up] * torch.linspace(0.8, 1.25, len(folds[up]))}
    try:
        found = failures(written_again(sound, "onnx", tmp_path), sound, "onnx")
    finally:
        sound.model.folds = folds
    assert "of model.layers.0.mlp." in found.get("adapters.style.basis", ""), found
    assert "adapters.style.function" not in found and "adapters.style.file" not in found


@pytest.mark.parametrize("target", ["onnx", "gguf"])
def test_an_adapter_of_another_base(target: str, sound: Sound, tmp_path: Path) -> None:
    bundle = written_again(sound, target, tmp_path, other_base=True)
    found = failures(bundle, sound, target)
    assert "the file belongs to another base" in found["adapters.style.owner"]
    assert "it was made for another base" in found["adapters.style.runs"]
    alone = validate(bundle, target=target)
    assert "adapters.style.owner" in {c.name for c in alone.checks if c.verdict == "fail"}


def without_magnitude(patch: Patch) -> None:
    applied = LowRank.applied

    def plain(self: LowRank, weight: Tensor, factor: float = 1.0) -> Tensor:
        return applied(replace(self, magnitude=None), weight, factor)

    patch.setattr(LowRank, "applied", plain)


def still_tied(patch: Patch) -> None:
    patch.setattr(merge, "_unties", lambda adapters, tables: False)


def dora(path: Path) -> Path:
    key = f"base_model.model.{Q0}.lora_magnitude_vector"
    return write_peft(path, {**matrices(), key: torch.linspace(0.5, 2, 128)}, use_dora=True)


def embedding_alone(path: Path) -> Path:
    table = open_checkpoint(TINY).tensor("model.embed_tokens.weight")
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    tensors = {**matrices(), "base_model.model.lm_head.weight": table + 0.01 * noise}
    return write_peft(path, tensors, modules_to_save=["lm_head"])


def merged_under(
    plant: Callable[[Patch], None], write: Callable[[Path], Path], directory: Path
) -> tuple[Bundle, Checkpoint]:
    """(bundle whose adapter was merged under a fault, reference that is merged without it)."""
    base, adapter = (
        write_hf(open_checkpoint(TINY).first_layers(1), directory / "model"),
        write(directory / "peft"),
    )
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        path = directory / "b.edgellama"
        bundle = export(base, path, recipe="int4-fast", context=32, adapters=[adapter], validate=False)
    return bundle, open_checkpoint(base, adapters=[adapter])


def test_dora_s_magnitude_left_out_of_the_merge(tmp_path: Path) -> None:
    bundle, reference = merged_under(without_magnitude, dora, tmp_path)
    report = validate(bundle, reference=reference, tokens=256, max_kl=100.0, relower=False)
    assert "structure.codes" in {c.name for c in report.checks if c.verdict == "fail"}


def test_a_tied_table_that_was_not_untied(tmp_path: Path) -> None:
    bundle, reference = merged_under(still_tied, embedding_alone, tmp_path)
    with pytest.raises(InputError, match="another config"):
        validate(bundle, reference=reference, tokens=256)
