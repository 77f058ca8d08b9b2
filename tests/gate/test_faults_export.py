"""Faults planted at an export's destination and in its cache: none may end as up to date, or in the new bundle.

The one who plants a fault can compute every hash inside the bundle again. Content keys stay those of the request.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST
from edgellama.bundle.golden import FILE as GOLDEN
from edgellama.bundle.record import FILE as RECORD
from edgellama.bundle.reports import stored_reports
from edgellama.bundle.restore import code_hashes
from edgellama.bundle.reuse import ReusedParts
from edgellama.bundle.vouchers import FOLDER
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.commands import export_phases
from edgellama.commands.export import export
from edgellama.errors import BundleError, CheckFailed, UsageError
from edgellama.export.quantization import calibration_cache, distillation
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.files import file_sha256
from edgellama.host import cache
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.recipe import RECIPES
from edgellama.text.calibration import MIN_TOKENS, Calibration, calibrate_on, calibration_texts
from tests.helpers.paths import TINY
from tests.helpers.planted_faults import copied, edit_json, flip_bit, refreshed
from tests.helpers.tiny_models import write_hf

CONTEXT = 64
RECIPE = RECIPES["int4-fast"]
ARTIFACT, REPORT = "xnnpack/model.pte", "reports/validate-xnnpack.json"


@dataclass(frozen=True)
class Sound:
    """A checkpoint, the bundle that was exported from it, and others of the same checkpoint."""

    model: Path
    bundle: Path
    other_context: Path
    other_recipe: Path

    def export(self, to: Path, *, force: bool) -> str:
        """Exports to `to` with the options of `bundle`; returns the lines for the user."""
        lines = io.StringIO()
        export(self.model, to, recipe=RECIPE, context=CONTEXT, force=force, progress=Progress(lines))
        return lines.getvalue()


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for this file."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, str(folder))
        yield folder


@pytest.fixture(scope="module")
def sound(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    folder = tmp_path_factory.mktemp("sound")
    model = write_hf(open_checkpoint(TINY).first_layers(1), folder / "model")
    paths = [folder / name / "b.edgellama" for name in ("bundle", "context", "recipe")]
    for path in paths:
        path.parent.mkdir()
    export(model, paths[0], recipe=RECIPE, context=CONTEXT)
    export(model, paths[1], recipe=RECIPE, context=CONTEXT // 2, validate=False)
    export(model, paths[2], recipe="int8", context=CONTEXT, validate=False)
    return Sound(model, *paths)


class Stopped(Exception):
    """The end of an export before its slow part."""


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[ReusedParts]:
    """Parts that an export keeps of the old bundle. It is stopped before it lowers anything."""
    parts_of_exports: list[ReusedParts] = []

    def stop(decision: Any, parts: ReusedParts, *rest: object) -> None:
        parts_of_exports.append(parts)
        raise Stopped

    monkeypatch.setattr(export_phases, "lower_missing", stop)
    return parts_of_exports


def contents(bundle: Path) -> dict[str, str]:
    """SHA-256 of every file, by path."""
    return {f.relative_to(bundle).as_posix(): file_sha256(f) for f in bundle.rglob("*") if f.is_file()}


def consistent(bundle: Path) -> None:
    """Makes everything in the bundle name the artifact that is there, as a careful forger would."""
    opened = refreshed(bundle)
    edit_json(bundle / REPORT, "artifact_sha256", value=opened.artifact_sha256("xnnpack"))
    edit_json(bundle / GOLDEN, "artifacts", "xnnpack", "sha256", value=opened.artifact_sha256("xnnpack"))
    refreshed(bundle, record=True)


def altered_artifact(bundle: Path, sound: Sound) -> None:
    flip_bit(bundle / ARTIFACT)
    refreshed(bundle)


def altered_artifact_and_record(bundle: Path, sound: Sound) -> None:
    flip_bit(bundle / ARTIFACT)
    refreshed(bundle, record=True)


def altered_artifact_and_everything_about_it(bundle: Path, sound: Sound) -> None:
    flip_bit(bundle / ARTIFACT)
    consistent(bundle)


def artifact_of_another_context(bundle: Path, sound: Sound) -> None:
    shutil.copy(sound.other_context / ARTIFACT, bundle / ARTIFACT)
    consistent(bundle)


def artifact_of_another_recipe(bundle: Path, sound: Sound) -> None:
    shutil.copy(sound.other_recipe / ARTIFACT, bundle / ARTIFACT)
    consistent(bundle)


def record_of_another_bundle(bundle: Path, sound: Sound) -> None:
    """The bundle of another recipe, with the requested bundle's record, report and golden vectors."""
    shutil.rmtree(bundle)
    shutil.copytree(sound.other_recipe, bundle)
    for name in (RECORD, REPORT):
        shutil.copy(sound.bundle / name, bundle / name)
    shutil.rmtree(bundle / "golden")
    shutil.copytree(sound.bundle / "golden", bundle / "golden")
    consistent(bundle)


def altered_report(bundle: Path, sound: Sound) -> None:
    edit_json(bundle / REPORT, "quality", "kl_mean", value=0.0001)
    refreshed(bundle, record=True)


def report_without_a_check(bundle: Path, sound: Sound) -> None:
    checks = json.loads((bundle / REPORT).read_text(encoding="utf-8"))["checks"]
    edit_json(bundle / REPORT, "checks", value=[c for c in checks if c["name"] != "parity.kl"])
    refreshed(bundle, record=True)


def report_about_another_artifact(bundle: Path, sound: Sound) -> None:
    edit_json(bundle / REPORT, "artifact_sha256", value="a" * 64)
    refreshed(bundle, record=True)


def altered_tokenizer(bundle: Path, sound: Sound) -> None:
    edit_json(bundle / "tokenizer/tokenizer.json", "truncation", value=None)
    flip_bit(bundle / "tokenizer/chat_template.jinja")
    refreshed(bundle, record=True)


def raised_golden_limits(bundle: Path, sound: Sound) -> None:
    edit_json(bundle / GOLDEN, "limits", "xnnpack", "parity_kl_mean", value=10.0)
    refreshed(bundle, record=True)


def altered_golden_array(bundle: Path, sound: Sound) -> None:
    array = bundle / "golden/reference.logp.bin"
    flip_bit(array)
    edit_json(bundle / GOLDEN, "arrays", "reference.logp", "sha256", value=file_sha256(array))
    refreshed(bundle, record=True)


def altered_export_report(bundle: Path, sound: Sound) -> None:
    edit_json(bundle / "reports/export.json", "tensors", 0, "sqnr_db", value=99.0)
    refreshed(bundle, record=True)


def altered_accuracy_in_the_manifest(bundle: Path, sound: Sound) -> None:
    edit_json(bundle / MANIFEST, "accuracy", "xnnpack", "kl_mean", value=0.0001)


def altered_requirements_in_the_manifest(bundle: Path, sound: Sound) -> None:
    entry = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))["artifacts"][0]
    edit_json(bundle / MANIFEST, "artifacts", value=[entry | {"bytes": 1}])


def manifest_with_a_key_twice(bundle: Path, sound: Sound) -> None:
    """Python keeps the last of two equal keys. A reader that keeps the first sees another licence of the model."""
    file = bundle / MANIFEST
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("{", '{\n  "accuracy": {},', 1), encoding="utf-8")


def voucher_of_another_bundle(bundle: Path, sound: Sound) -> None:
    """A voucher copied to the altered manifest's name still speaks of the manifest that it was written for."""
    altered_artifact_and_everything_about_it(bundle, sound)
    vouchers = Path(os.environ[cache.VARIABLE]) / FOLDER
    original = vouchers / file_sha256(sound.bundle / MANIFEST)
    shutil.copy(original, vouchers / file_sha256(bundle / MANIFEST))


Fault = Callable[[Path, Sound], None]
FAULTS: list[Fault] = [
    altered_artifact,
    altered_artifact_and_record,
    altered_artifact_and_everything_about_it,
    artifact_of_another_context,
    artifact_of_another_recipe,
    record_of_another_bundle,
    altered_report,
    report_without_a_check,
    report_about_another_artifact,
    altered_tokenizer,
    raised_golden_limits,
    altered_golden_array,
    altered_export_report,
    altered_accuracy_in_the_manifest,
    altered_requirements_in_the_manifest,
    manifest_with_a_key_twice,
    voucher_of_another_bundle,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.replace("_", " "))
def test_nothing_of_an_altered_bundle_is_kept(
    fault: Fault, sound: Sound, tmp_path: Path, kept: list[ReusedParts]
) -> None:
    bundle = copied(sound.bundle, tmp_path / "b.edgellama")
    fault(bundle, sound)
    assert Bundle.open(bundle).problems() == [], "every hash fits"
    for force in (False, True):
        # Refused because it differs, or repeated because nothing vouches for it: never up to date.
        with pytest.raises((Stopped, UsageError)):
            sound.export(bundle, force=force)
    assert kept and all(not p.artifacts and not p.reports and not p.golden and not p.complete for p in kept)


def test_a_sound_bundle_is_kept(sound: Sound, tmp_path: Path, kept: list[ReusedParts]) -> None:
    """The counterpart of the faults: without one, the same bundle at another place is up to date."""
    bundle = copied(sound.bundle, tmp_path / "b.edgellama")
    for force in (False, True):
        assert "is up to date" in sound.export(bundle, force=force)
    with pytest.raises(Stopped):
        export(sound.model, bundle, recipe=RECIPE, context=CONTEXT, max_bytes=10**9, force=True)
    assert kept[0].complete and set(kept[0].reports) == {"xnnpack"}


@pytest.mark.parametrize("name", [ARTIFACT, "tokenizer", REPORT])
def test_a_link_in_place_of_a_file_is_not_kept(
    name: str, sound: Sound, tmp_path: Path, kept: list[ReusedParts]
) -> None:
    """The link leads to the sound content, which may change later."""
    bundle = copied(sound.bundle, tmp_path / "b.edgellama")
    moved = (bundle / name).rename(tmp_path / "elsewhere")
    (bundle / name).symlink_to(moved)
    with pytest.raises(UsageError, match="symbolic link"):
        sound.export(bundle, force=False)
    with pytest.raises(Stopped):
        sound.export(bundle, force=True)
    assert not kept[0].complete
    assert not (kept[0].artifacts if name == ARTIFACT else kept[0].reports if name == REPORT else False)


@pytest.mark.slow
def test_an_altered_bundle_is_refused_and_then_replaced(sound: Sound, tmp_path: Path) -> None:
    """The whole way: without --force the repeated export differs, with it the new bundle has the sound bytes."""
    bundle = copied(sound.bundle, tmp_path / "b.edgellama")
    altered_artifact_and_everything_about_it(bundle, sound)
    forged = contents(bundle)
    with pytest.raises(CheckFailed, match=r"makes other content of: .*xnnpack/model\.pte"):
        sound.export(bundle, force=False)
    assert contents(bundle) == forged
    lines = sound.export(bundle, force=True)
    assert "nothing of the old bundle is kept: no export on this machine is known to have written it" in lines
    assert contents(bundle) == contents(sound.bundle)


@pytest.mark.slow
def test_a_bundle_of_another_machine_is_made_again_and_compared(
    sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export says why it takes longer, and its voucher makes the next one quick."""
    bundle = copied(sound.bundle, tmp_path / "b.edgellama")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    lines = sound.export(bundle, force=False)
    assert "no export on this machine is known to have written it; the export is repeated" in lines
    assert "the repeated export gave the same bytes" in lines
    assert contents(bundle) == contents(sound.bundle)
    assert f"{bundle} is up to date\n" == sound.export(bundle, force=False)


def test_without_a_cache_the_reason_is_named(
    sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: list[ReusedParts]
) -> None:
    bundle = copied(sound.bundle, tmp_path / "b.edgellama")
    monkeypatch.setenv(cache.VARIABLE, cache.OFF)
    lines = io.StringIO()
    with pytest.raises(Stopped):
        export(sound.model, bundle, recipe=RECIPE, context=CONTEXT, progress=Progress(lines))
    assert "because the cache is off (EDGELLAMA_CACHE)" in lines.getvalue()
    assert kept[0].artifacts == {}


def test_stored_reports_are_about_the_artifact(sound: Sound, tmp_path: Path) -> None:
    """`validate --baseline`, `diff` and the pages of an export read them."""
    assert stored_reports(Bundle.open(sound.bundle))["xnnpack"]["artifact_sha256"] == Bundle.open(
        sound.bundle
    ).artifact_sha256("xnnpack")
    bundle = copied(sound.bundle, tmp_path / "b.edgellama")
    altered_artifact(bundle, sound)
    with pytest.raises(BundleError, match="about another artifact"):
        stored_reports(Bundle.open(bundle))


CALIBRATED = replace(RECIPES["int4"], algorithm="scales", calibration_tokens=MIN_TOKENS)


@dataclass(frozen=True)
class Calibrated:
    """Two layers, their calibration, and the codes without a cache."""

    checkpoint: Checkpoint
    calibration: Calibration
    codes: dict[str, str]

    def quantized(self, lines: io.StringIO) -> Llama:
        """The model, quantized with the cache."""
        store = LayerStore.of(self.checkpoint, CALIBRATED, self.calibration)
        return quantized_llama(
            self.checkpoint,
            CALIBRATED,
            CONTEXT,
            Progress(lines),
            calibrated_on=self.calibration,
            store=store,
        )[0]

    @property
    def folder(self) -> Path:
        """Directory of the calibration in the cache."""
        folder = LayerStore.of(self.checkpoint, CALIBRATED, self.calibration).directory
        assert folder is not None
        return folder


@pytest.fixture(scope="module")
def calibrated(tiny_checkpoint: Checkpoint) -> Calibrated:
    checkpoint = tiny_checkpoint.first_layers(2)
    calibration = calibrate_on(calibration_texts(), checkpoint.tokenizer, MIN_TOKENS, CONTEXT)
    model, _ = quantized_llama(checkpoint, CALIBRATED, CONTEXT, calibrated_on=calibration)
    return Calibrated(checkpoint, calibration, code_hashes(model))


def rewritten(file: Path, **changes: str) -> None:
    """Changes the metadata of a cached layer and makes its hash fit again."""
    with safe_open(file, "pt") as stored:
        tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
        metadata = {**stored.metadata(), **changes}
    metadata.pop("sha256")
    metadata["sha256"] = calibration_cache._sha256(tensors, metadata)
    save_file(tensors, file, metadata)


def of_other_calibration(folder: Path, calibrated: Calibrated, **changes: Any) -> None:
    """Puts the layers of another calibration in place of this one's."""
    other = replace(calibrated, **changes)
    other.quantized(io.StringIO())
    assert other.folder != folder
    for index in (0, 1):
        shutil.copy(other.folder / f"{index}.safetensors", folder / f"{index}.safetensors")


def altered_layer(folder: Path, calibrated: Calibrated) -> None:
    flip_bit(folder / "1.safetensors", 0.9)


def truncated_layer(folder: Path, calibrated: Calibrated) -> None:
    file = folder / "1.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def empty_layer(folder: Path, calibrated: Calibrated) -> None:
    (folder / "0.safetensors").write_bytes(b"")


def exchanged_layers(folder: Path, calibrated: Calibrated) -> None:
    (folder / "0.safetensors").rename(folder / "2")
    (folder / "1.safetensors").rename(folder / "0.safetensors")
    (folder / "2").rename(folder / "1.safetensors")


def layers_of_another_checkpoint(folder: Path, calibrated: Calibrated) -> None:
    read = calibrated.checkpoint.read
    of_other_calibration(
        folder, calibrated, checkpoint=replace(calibrated.checkpoint, read=lambda name: read(name) * 1.25)
    )


def layers_of_another_text(folder: Path, calibrated: Calibrated) -> None:
    tokenizer = calibrated.checkpoint.tokenizer
    texts = calibration_texts()[:1]
    of_other_calibration(folder, calibrated, calibration=calibrate_on(texts, tokenizer, MIN_TOKENS, CONTEXT))


def layers_of_another_version(folder: Path, calibrated: Calibrated) -> None:
    """Written by other code: `tools` has the hash of edgellama's sources and the versions of all packages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_cache, "tools", lambda: {"edgellama sources": "0" * 64})
        of_other_calibration(folder, calibrated)


def layers_without_a_key(folder: Path, calibrated: Calibrated) -> None:
    for index in (0, 1):
        rewritten(folder / f"{index}.safetensors", key="")


def a_tensor_of_another_shape(folder: Path, calibrated: Calibrated) -> None:
    file = folder / "1.safetensors"
    with safe_open(file, "pt") as stored:
        tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    tensors["input_layernorm.weight"] = tensors["input_layernorm.weight"][:-1].clone()
    save_file(tensors, file, metadata)
    rewritten(file)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (altered_layer, "the hash that it was saved with"),
        (truncated_layer, "not used"),
        (empty_layer, "not used"),
        (exchanged_layers, "it is layer"),
        (layers_of_another_checkpoint, "another checkpoint, text, recipe or version"),
        (layers_of_another_text, "another checkpoint, text, recipe or version"),
        (layers_of_another_version, "another checkpoint, text, recipe or version"),
        (layers_without_a_key, "another checkpoint, text, recipe or version"),
        (a_tensor_of_another_shape, "its tensors are not those of the layer"),
    ],
    ids=lambda value: value.__name__.replace("_", " ") if callable(value) else None,
)
def test_a_faulty_cache_is_computed_again_with_a_note(
    fault: Callable[[Path, Calibrated], None],
    reason: str,
    calibrated: Calibrated,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    assert code_hashes(calibrated.quantized(io.StringIO())) == calibrated.codes
    fault(calibrated.folder, calibrated)
    lines = io.StringIO()
    assert code_hashes(calibrated.quantized(lines)) == calibrated.codes
    notes = [line for line in lines.getvalue().splitlines() if line.startswith("note: the cached layer")]
    assert notes and all(reason in note for note in notes)
    lines = io.StringIO()
    assert code_hashes(calibrated.quantized(lines)) == calibrated.codes
    assert "note" not in lines.getvalue()


def test_a_tensor_changed_in_memory_has_its_own_cache(
    calibrated: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor in the middle of the model, which is in no sample of its tensors."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    read, changed = calibrated.checkpoint.read, "model.layers.1.mlp.up_proj.weight"
    checkpoint = replace(
        calibrated.checkpoint, read=lambda name: read(name) * (1.5 if name == changed else 1)
    )
    assert replace(calibrated, checkpoint=checkpoint).folder != calibrated.folder


@pytest.mark.parametrize("damage", ["altered", "truncated", "of another calibration"])
def test_a_faulty_saved_tuning_starts_again(damage: str, tmp_path: Path) -> None:
    """The saved state of a tuning run holds scales and norms that would end in the artifact."""
    state = tmp_path / "recovery.pt"
    store = LayerStore(tmp_path, "key")
    saved = distillation._Saved(store, "run", Progress())
    saved.save(2, {}, torch.optim.Adam([torch.zeros(1)]), distillation._Best(0.1, 0.2))
    assert saved.finished(2) is not None
    if damage == "of another calibration":
        saved = distillation._Saved(LayerStore(tmp_path, "other key"), "run", Progress())
    elif damage == "altered":
        flip_bit(state, 0.6)
    else:
        state.write_bytes(state.read_bytes()[:-9])
    lines = io.StringIO()
    saved.progress = Progress(lines)
    assert saved.finished(2) is None
    assert "note: the cached run is not used" in lines.getvalue() and not state.exists()
