"""Tests of reuse: an export that is up to date ends at once, and a changed part is redone to the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgellama.bundle import Bundle
from edgellama.bundle.record import FILE, ExportRequest, checkpoint_files, read_build_record, stale_reasons
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.commands import export_phases
from edgellama.commands.export import export
from edgellama.errors import UsageError
from edgellama.export.onnx import lower as onnx_lower
from edgellama.export.plan import calibration
from edgellama.export.quantization import calibrate
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.xnnpack import lower as xnnpack_lower
from edgellama.files import digest, file_sha256
from edgellama.gate import agreement, golden
from edgellama.host import cache, versions
from edgellama.recipe import RECIPES, TARGET_OPTIONS, Recipe
from edgellama.targets import TARGETS
from edgellama.text.windows import Text
from tests.helpers.paths import ROOT, TINY
from tests.helpers.tiny_models import write_hf

CONTEXT = 64
ORT = replace(RECIPES["int4-fast"], name="fast")
PORTABLE = replace(ORT, onnx_form="portable")
BOTH = ("xnnpack", "onnx")


@pytest.fixture(scope="module", autouse=True)
def vouchers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for this file: nothing is reused without a voucher in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(open_checkpoint(TINY).first_layers(1), tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def exported_bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for two targets. Read-only."""
    output = tmp_path_factory.mktemp("exported") / "b.edgellama"
    export(model, output, targets=BOTH, recipe=ORT, context=CONTEXT)
    return output


@pytest.fixture
def old_bundle(exported_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the exported bundle."""
    return Path(shutil.copytree(exported_bundle, tmp_path / "b.edgellama"))


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Slow steps in the order in which they run."""
    steps: list[str] = []

    def record(module: Any, name: str, describe: Callable[..., str]) -> None:
        function = getattr(module, name)

        def recorded(*args: Any, **options: Any) -> Any:
            steps.append(describe(*args, **options))
            return function(*args, **options)

        monkeypatch.setattr(module, name, recorded)

    record(xnnpack_lower, "lower_to_xnnpack", lambda *a, **o: "lower xnnpack")
    record(onnx_lower, "lower_to_onnx", lambda *a, **o: "lower onnx")
    record(export_phases, "validate", lambda *a, **o: f"validate {o['target']}")
    record(agreement, "load", lambda bundle, name: f"compare {name}")
    record(golden, "load", lambda bundle, name: f"golden {name}")
    record(golden, "scored_logits", lambda model, *a: f"golden {type(model).__name__}")
    return steps


def contents(bundle: Path) -> dict[str, str]:
    """SHA-256 of every file, by path."""
    return {f.relative_to(bundle).as_posix(): file_sha256(f) for f in bundle.rglob("*") if f.is_file()}


def request(targets: Sequence[str] = BOTH, recipe: Recipe = ORT, **changes: Any) -> ExportRequest:
    return ExportRequest.of(recipe=recipe, targets=targets, context=CONTEXT, **changes)


COMMAND = """
import json, sys, time
start = time.perf_counter()
from edgellama.cli.dispatch import main
code = main(sys.argv[1:])
print(json.dumps({"code": code, "torch": "torch" in sys.modules, "seconds": time.perf_counter() - start}))
"""


def test_a_bundle_that_is_up_to_date(exported_bundle: Path, model: Path, tmp_path: Path) -> None:
    """The command ends without importing torch, without --force, and without touching a file."""
    before = {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in exported_bundle.rglob("*")}
    recipe = tmp_path / "fast.json"
    recipe.write_text(json.dumps(ORT.to_dict()), encoding="utf-8")
    options = ["-t", "xnnpack", "-t", "onnx", "-r", str(recipe), "--context", str(CONTEXT)]
    for force in ([], ["--force"]):
        result = tmp_path / "result.json"
        command = ["export", str(model), "-o", str(exported_bundle), *options, *force, "--json", str(result)]
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *command],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        outcome = json.loads(done.stdout)
        assert outcome["code"] == 0 and not outcome["torch"], done.stderr
        assert f"{exported_bundle} is up to date" in done.stderr
        data = json.loads(result.read_text())
        assert data["up_to_date"] is True and data["manifest"] == Bundle.open(exported_bundle).manifest
    assert {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in exported_bundle.rglob("*")} == before


def test_the_function_export_also_returns_at_once(
    exported_bundle: Path, model: Path, slow_steps: list[str]
) -> None:
    for checkpoint in (model, open_checkpoint(model)):
        bundle = export(checkpoint, exported_bundle, targets=BOTH, recipe=ORT, context=CONTEXT)
        assert bundle.path == exported_bundle and slow_steps == []


def test_the_build_record_conforms_to_the_schema(exported_bundle: Path) -> None:
    record = read_build_record(Bundle.open(exported_bundle))
    assert record is not None and set(record["targets"]) == set(BOTH)
    assert record["key"] == digest(record["inputs"])
    text = (exported_bundle / FILE).read_text(encoding="utf-8")
    assert str(exported_bundle.parent) not in text and json.loads(text) == record


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"recipe": PORTABLE}, ["other recipe"]),
        ({"targets": ("xnnpack",)}, ["other targets", "other tools"]),
        ({"targets": ("onnx", "xnnpack")}, ["other targets"]),
        ({"max_kl": 0.4}, ["other max kl"]),
        ({"max_bytes": 10**9}, ["other max bytes"]),
        ({"validation_tokens": None}, ["other validation tokens"]),
        ({"calibration": [Text("ours", "words")]}, ["other calibration"]),
    ],
)
def test_a_changed_option_is_a_reason(
    changes: dict[str, Any], reasons: list[str], exported_bundle: Path, model: Path
) -> None:
    assert stale_reasons(exported_bundle, model, request()) == []
    assert stale_reasons(exported_bundle, model, request(**changes)) == reasons


def test_a_changed_checkpoint_name_or_tool_is_a_reason(
    exported_bundle: Path, old_bundle: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stale_reasons(old_bundle.rename(tmp_path / "c.edgellama"), model, request()) == ["other name"]
    assert stale_reasons(tmp_path / "nothing", model, request()) is None
    assert stale_reasons(exported_bundle, tmp_path / "nothing", request()) == ["other checkpoint"]
    for name in ("model.safetensors", "tokenizer.json", "config.json", "generation_config.json"):
        copy = Path(shutil.copytree(model, tmp_path / name / "model"))
        assert stale_reasons(exported_bundle, copy, request()) == []
        (copy / name).write_bytes((copy / name).read_bytes() + b" ")
        assert stale_reasons(exported_bundle, copy, request()) == ["other checkpoint"]
    monkeypatch.setattr(versions, "_version", lambda package: "0")
    assert stale_reasons(exported_bundle, model, request()) == ["other tools"]


@pytest.mark.parametrize("name", ["xnnpack/model.pte", "golden/golden.json", "reports/validate-onnx.json"])
def test_a_damaged_bundle_is_not_up_to_date(name: str, old_bundle: Path, model: Path) -> None:
    content = bytearray((old_bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (old_bundle / name).write_bytes(content)
    reasons = stale_reasons(old_bundle, model, request())
    assert reasons is not None and reasons[0].startswith(name)


def test_a_bundle_without_a_record_is_not_up_to_date(old_bundle: Path, model: Path) -> None:
    (old_bundle / FILE).write_text("{}")
    assert stale_reasons(old_bundle, model, request()) == ["no record of its inputs"]


def test_a_different_bundle_at_the_destination_needs_force(
    old_bundle: Path, model: Path, slow_steps: list[str]
) -> None:
    before = contents(old_bundle)
    with pytest.raises(UsageError, match="differs from the requested bundle: other recipe") as caught:
        export(model, old_bundle, targets=BOTH, recipe=PORTABLE, context=CONTEXT)
    assert "--force" in caught.value.remedy
    assert contents(old_bundle) == before and slow_steps == []


def test_every_file_of_a_checkpoint_is_in_the_key(model: Path, gguf: Path) -> None:
    """Audit events list the files that the reader opens."""
    opened: list[str] = []
    active = True

    def record_open(event: str, args: tuple[Any, ...]) -> None:
        if active and event == "open" and isinstance(args[0], (str, os.PathLike)):
            opened.append(os.fspath(args[0]))

    sys.addaudithook(record_open)
    checkpoint = open_checkpoint(model)
    active = False
    names = {Path(name).name for name in opened if name.startswith(str(model))}
    assert names and names | {file.name for file in checkpoint.files} <= set(checkpoint_files(model))
    assert list(checkpoint_files(gguf)) == [".gguf"]


@pytest.mark.slow
def test_a_checkpoint_changed_in_memory_is_never_up_to_date(model: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(model)
    assert opened.as_opened and not replace(opened, notes=()).as_opened
    output = tmp_path / "b.edgellama"
    changed = replace(opened, read=lambda name: opened.read(name) * 1.0)
    export(changed, output, recipe=ORT, context=CONTEXT, validate=False)
    same_request = request(["xnnpack"], validation_tokens=None)
    assert stale_reasons(output, model, same_request) == ["other checkpoint"]
    with pytest.raises(UsageError, match="exists"):
        export(changed, output, recipe=ORT, context=CONTEXT, validate=False)


@pytest.fixture(scope="module")
def portable_contents(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Contents of a bundle by PORTABLE that was exported without an old one."""
    output = tmp_path_factory.mktemp("portable") / "b.edgellama"
    export(model, output, targets=BOTH, recipe=PORTABLE, context=CONTEXT)
    return contents(output)


@pytest.mark.slow
def test_an_option_of_one_target_redoes_that_target(
    old_bundle: Path, model: Path, portable_contents: dict[str, str], slow_steps: list[str]
) -> None:
    export(model, old_bundle, targets=BOTH, recipe=PORTABLE, context=CONTEXT, force=True)
    assert slow_steps == [
        "lower onnx",
        "validate onnx",
        "compare xnnpack",
        "compare onnx",
        "golden onnx",
        "golden QuantizedReference",  # for the noise floor
    ]
    assert contents(old_bundle) == portable_contents
    assert [path.name for path in old_bundle.parent.iterdir()] == ["b.edgellama"]


@pytest.mark.slow
def test_a_target_is_removed_and_another_added(
    old_bundle: Path, model: Path, slow_steps: list[str], exported_bundle: Path
) -> None:
    export(model, old_bundle, targets=["onnx"], recipe=ORT, context=CONTEXT, force=True)
    assert slow_steps == []
    assert Bundle.open(old_bundle).problems() == [] and not (old_bundle / "xnnpack").exists()
    export(model, old_bundle, targets=BOTH, recipe=ORT, context=CONTEXT, force=True)
    assert slow_steps == [
        "lower xnnpack",
        "validate xnnpack",
        "compare xnnpack",
        "compare onnx",
        "golden xnnpack",
        "golden QuantizedReference",
    ]
    assert contents(old_bundle) == contents(exported_bundle)


@pytest.mark.slow
def test_a_changed_limit_redoes_the_gate(old_bundle: Path, model: Path, slow_steps: list[str]) -> None:
    export(model, old_bundle, targets=BOTH, recipe=ORT, context=CONTEXT, max_bytes=10**9, force=True)
    assert slow_steps == []
    export(model, old_bundle, targets=BOTH, recipe=ORT, context=CONTEXT, max_kl=0.4, force=True)
    assert slow_steps == ["validate xnnpack", "lower xnnpack", "validate onnx", "lower onnx"]
    report = json.loads((old_bundle / "reports/validate-onnx.json").read_text())
    assert {check["name"]: check["limit"] for check in report["checks"]}["quality.kl"] == 0.4


def test_damaged_parts_are_redone(
    old_bundle: Path, model: Path, exported_bundle: Path, slow_steps: list[str]
) -> None:
    for name in ("onnx/model.onnx.data", "golden/xnnpack.logp.bin"):
        content = bytearray((old_bundle / name).read_bytes())
        content[100] ^= 1
        (old_bundle / name).write_bytes(content)
    export(model, old_bundle, targets=BOTH, recipe=ORT, context=CONTEXT, force=True)
    assert [step for step in slow_steps if step.startswith("lower")] == ["lower onnx"]
    assert "golden StreamedLlama" in slow_steps and "golden xnnpack" in slow_steps
    assert contents(old_bundle) == contents(exported_bundle)


CALIBRATED = replace(RECIPES["int4"], name="short", calibration_tokens=2048)


@pytest.mark.slow
def test_codes_are_cached_and_shared(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Checkpoint
) -> None:
    """Runs, targets and options of targets share the cache. A damaged file is calibrated again."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    calibrated_layers: list[int] = []
    quantize_layer = calibrate._quantize_layer

    def recorded(model: Any, index: int, *rest: Any) -> Any:
        calibrated_layers.append(index)
        return quantize_layer(model, index, *rest)

    monkeypatch.setattr(calibrate, "_quantize_layer", recorded)

    def exported_codes(name: str, target: str, recipe: Recipe) -> dict[str, str]:
        output = tmp_path / name / "b.edgellama"
        output.parent.mkdir()
        export(model, output, targets=[target], recipe=recipe, context=CONTEXT, validate=False)
        return json.loads((output / "reports/export.json").read_text())["codes"]  # type: ignore[no-any-return]

    first = exported_codes("first", "xnnpack", CALIBRATED)
    assert calibrated_layers == [0]
    assert exported_codes("second", "onnx", replace(CALIBRATED, onnx_form="portable")) == first
    assert calibrated_layers == [0]
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)
    assert exported_codes("third", "xnnpack", CALIBRATED) == first
    assert calibrated_layers == [0, 0] and file.read_bytes() != content
    monkeypatch.setenv(cache.VARIABLE, cache.OFF)
    assert exported_codes("fourth", "xnnpack", CALIBRATED) == first
    assert calibrated_layers == [0, 0, 0]


def test_a_cache_that_cannot_be_written_is_no_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, "/proc/edgellama")
    checkpoint = open_checkpoint(model)
    calibrated_on = calibration(checkpoint, CALIBRATED, CONTEXT)
    assert calibrated_on is not None
    store = LayerStore.of(checkpoint, CALIBRATED, calibrated_on)
    quantized_llama(checkpoint, CALIBRATED, CONTEXT, calibrated_on=calibrated_on, store=store)
    assert store.directory is None


def test_the_cache_stays_below_its_size(tmp_path: Path) -> None:
    """The least recently used entry is removed first. The entry in use is kept at any size."""
    for age, name in enumerate(("new", "middle", "old", "ours")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.safetensors").write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    cache.trim(tmp_path, tmp_path / "ours", limit=400)
    assert len(list(tmp_path.iterdir())) == 4
    cache.trim(tmp_path, tmp_path / "ours", limit=399)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "middle", "ours"}
    cache.touch(tmp_path / "middle")
    cache.trim(tmp_path, tmp_path / "ours", limit=250)
    assert {path.name for path in tmp_path.iterdir()} == {"middle", "ours"}
    cache.trim(tmp_path, tmp_path / "ours", limit=0)
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}
    cache.trim(tmp_path / "nowhere", tmp_path / "nowhere" / "a", limit=0)


def test_every_option_of_a_target_is_listed() -> None:
    assert {option for target in TARGETS.values() for option in target.options} == set(TARGET_OPTIONS)
