"""An export whose bundle is made already says so at once; one that differs in a part redoes that part, to the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgellama.bundle import Bundle
from edgellama.bundle import record as request
from edgellama.bundle.record import ExportRequest, checkpoint_files, read_build_record, stale_reasons
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.commands import export as build
from edgellama.commands import export_phases
from edgellama.errors import UsageError
from edgellama.export.onnx import lower as to_onnx
from edgellama.export.plan import calibration
from edgellama.export.quantization import calibrate, calibration_cache
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.xnnpack import lower as to_xnnpack
from edgellama.files import digest, file_sha256
from edgellama.gate import agreement
from edgellama.gate import golden as record_golden
from edgellama.host import versions
from edgellama.recipe import RECIPES, Recipe
from edgellama.targets import TARGETS
from edgellama.text.windows import Text
from tests.helpers.tiny_models import TINY, write_hf

CONTEXT = 64
ORT = RECIPES["int4-fast"]
PORTABLE = replace(ORT, onnx_form="portable")
BOTH = ("xnnpack", "onnx")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(open_checkpoint(TINY).first_layers(1), tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for two targets. Read-only."""
    output = tmp_path_factory.mktemp("made") / "b.edgellama"
    build.export(model, output, targets=BOTH, recipe=ORT, context=CONTEXT)
    return output


@pytest.fixture
def old(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "b.edgellama"))


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done that takes time, in order."""
    done: list[str] = []

    def watch(module: Any, name: str, what: Callable[..., str]) -> None:
        function = getattr(module, name)

        def watched(*args: Any, **options: Any) -> Any:
            done.append(what(*args, **options))
            return function(*args, **options)

        monkeypatch.setattr(module, name, watched)

    watch(to_xnnpack, "lower_to_xnnpack", lambda *a, **o: "lower xnnpack")
    watch(to_onnx, "lower_to_onnx", lambda *a, **o: "lower onnx")
    watch(export_phases, "validate", lambda *a, **o: f"validate {o['target']}")
    watch(agreement, "load", lambda bundle, name: f"compare {name}")
    watch(record_golden, "load", lambda bundle, name: f"golden {name}")
    watch(record_golden, "_reference", lambda *a: "golden reference")
    return done


def contents(bundle: Path) -> dict[str, str]:
    return {f.relative_to(bundle).as_posix(): file_sha256(f) for f in bundle.rglob("*") if f.is_file()}


def asked(targets: Sequence[str] = BOTH, recipe: Recipe = ORT, **changes: Any) -> ExportRequest:
    return ExportRequest.of(recipe=recipe, targets=targets, context=CONTEXT, **changes)


COMMAND = """
import json, sys, time
start = time.perf_counter()
from edgellama.cli.dispatch import main
code = main(sys.argv[1:])
print(json.dumps({"code": code, "torch": "torch" in sys.modules, "seconds": time.perf_counter() - start}))
"""


def test_a_bundle_that_is_made_already(made: Path, model: Path, tmp_path: Path) -> None:
    """The command ends without importing torch, without --force, and without touching a file."""
    before = {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in made.rglob("*")}
    options = ["-t", "xnnpack", "-t", "onnx", "-r", "int4-fast", "--context", str(CONTEXT)]
    for force in ([], ["--force"]):
        result = tmp_path / "result.json"
        command = ["export", str(model), "-o", str(made), *options, *force, "--json", str(result)]
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *command],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout)
        assert found["code"] == 0 and not found["torch"], done.stderr
        assert f"{made} is up to date" in done.stderr
        said = json.loads(result.read_text())
        assert said["up_to_date"] is True and said["manifest"] == Bundle.open(made).manifest
    assert {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in made.rglob("*")} == before


def test_python_gets_it_too(made: Path, model: Path, work: list[str]) -> None:
    bundle = build.export(model, made, targets=BOTH, recipe=ORT, context=CONTEXT)
    again = build.export(open_checkpoint(model), made, targets=BOTH, recipe=ORT, context=CONTEXT)
    assert bundle.path == again.path == made and work == []


def test_the_record_is_what_the_schema_says(made: Path) -> None:
    record = read_build_record(Bundle.open(made))
    assert record is not None and set(record["targets"]) == set(BOTH)
    assert record["key"] == digest(record["inputs"])
    text = (made / request.FILE).read_text(encoding="utf-8")
    assert str(made.parent) not in text and json.loads(text) == record


@pytest.mark.parametrize(
    ("changes", "said"),
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
def test_what_is_other(changes: dict[str, Any], said: list[str], made: Path, model: Path) -> None:
    assert stale_reasons(made, model, asked()) == []
    assert stale_reasons(made, model, asked(**changes)) == said


def test_other_surroundings(
    made: Path, old: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stale_reasons(old.rename(tmp_path / "c.edgellama"), model, asked()) == ["other name"]
    assert stale_reasons(tmp_path / "nothing", model, asked()) is None
    assert stale_reasons(made, tmp_path / "nothing", asked()) == ["other checkpoint"]
    for name in ("model.safetensors", "tokenizer.json", "config.json", "generation_config.json"):
        copy = Path(shutil.copytree(model, tmp_path / name / "model"))
        assert stale_reasons(made, copy, asked()) == []
        (copy / name).write_bytes((copy / name).read_bytes() + b" ")
        assert stale_reasons(made, copy, asked()) == ["other checkpoint"]
    monkeypatch.setattr(versions, "_version", lambda package: "0")
    assert stale_reasons(made, model, asked()) == ["other tools"]


@pytest.mark.parametrize("name", ["xnnpack/model.pte", "golden/golden.json", "reports/validate-onnx.json"])
def test_a_damaged_bundle_is_not_up_to_date(name: str, old: Path, model: Path) -> None:
    content = bytearray((old / name).read_bytes())
    content[len(content) // 2] ^= 1
    (old / name).write_bytes(content)
    found = stale_reasons(old, model, asked())
    assert found is not None and found[0].startswith(name)


def test_without_a_record_nothing_is_known(old: Path, model: Path) -> None:
    (old / request.FILE).write_text("{}")
    assert stale_reasons(old, model, asked()) == ["no record of what it was made from"]


def test_another_bundle_in_the_place_needs_force(old: Path, model: Path, work: list[str]) -> None:
    before = contents(old)
    with pytest.raises(UsageError, match="is not what would be made: other recipe") as caught:
        build.export(model, old, targets=BOTH, recipe=PORTABLE, context=CONTEXT)
    assert "--force" in caught.value.remedy
    assert contents(old) == before and work == []


def test_all_that_a_reader_reads_is_in_the_key(model: Path, gguf: Path) -> None:
    """Python tells of every file that is opened."""
    opened: list[str] = []
    active = True

    def note(event: str, args: tuple[Any, ...]) -> None:
        if active and event == "open" and isinstance(args[0], (str, os.PathLike)):
            opened.append(os.fspath(args[0]))

    sys.addaudithook(note)
    checkpoint = open_checkpoint(model)
    active = False
    read = {Path(name).name for name in opened if name.startswith(str(model))}
    assert read and read | {file.name for file in checkpoint.files} <= set(checkpoint_files(model))
    assert list(checkpoint_files(gguf)) == [".gguf"]


def test_a_checkpoint_changed_in_memory_is_never_up_to_date(model: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(model)
    assert opened.as_opened and not replace(opened, notes=()).as_opened
    output = tmp_path / "b.edgellama"
    changed = replace(opened, read=lambda name: opened.read(name) * 1.0)
    build.export(changed, output, recipe=ORT, context=CONTEXT, validate=False)
    request = ExportRequest.of(recipe=ORT, targets=["xnnpack"], context=CONTEXT, validation_tokens=None)
    assert stale_reasons(output, model, request) == ["other checkpoint"]
    with pytest.raises(UsageError, match="exists"):
        build.export(changed, output, recipe=ORT, context=CONTEXT, validate=False)


@pytest.fixture(scope="module")
def anew(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """Contents of a bundle that was made without an old one."""
    made: dict[str, dict[str, str]] = {}

    def export(targets: Sequence[str], recipe: Recipe, **options: Any) -> dict[str, str]:
        key = repr((targets, recipe, options))
        if key not in made:
            output = tmp_path_factory.mktemp("anew") / "b.edgellama"
            build.export(model, output, targets=targets, recipe=recipe, context=CONTEXT, **options)
            made[key] = contents(output)
        return made[key]

    return export


def test_one_target_s_option_redoes_that_target(
    old: Path, model: Path, anew: Callable[..., dict[str, str]], work: list[str]
) -> None:
    build.export(model, old, targets=BOTH, recipe=PORTABLE, context=CONTEXT, force=True)
    assert work == [
        "lower onnx",
        "validate onnx",
        "compare xnnpack",
        "compare onnx",
        "golden onnx",
    ]
    assert contents(old) == anew(BOTH, PORTABLE)
    assert [path.name for path in old.parent.iterdir()] == ["b.edgellama"]


def test_a_target_is_taken_away_and_another_added(
    old: Path, model: Path, anew: Callable[..., dict[str, str]], work: list[str], made: Path
) -> None:
    build.export(model, old, targets=["onnx"], recipe=ORT, context=CONTEXT, force=True)
    assert work == []
    assert Bundle.open(old).problems() == [] and not (old / "xnnpack").exists()
    build.export(model, old, targets=BOTH, recipe=ORT, context=CONTEXT, force=True)
    assert work == ["lower xnnpack", "validate xnnpack", "compare xnnpack", "compare onnx", "golden xnnpack"]
    assert contents(old) == contents(made)


def test_another_limit_redoes_the_gate(old: Path, model: Path, work: list[str]) -> None:
    build.export(model, old, targets=BOTH, recipe=ORT, context=CONTEXT, max_bytes=10**9, force=True)
    assert work == []
    build.export(model, old, targets=BOTH, recipe=ORT, context=CONTEXT, max_kl=0.4, force=True)
    assert work == ["validate xnnpack", "validate onnx"]
    report = json.loads((old / "reports/validate-onnx.json").read_text())
    assert {check["name"]: check["limit"] for check in report["checks"]}["quality.kl"] == 0.4


def test_what_is_damaged_is_made_again(old: Path, model: Path, made: Path, work: list[str]) -> None:
    for name in ("onnx/model.onnx.data", "golden/xnnpack.logp.bin"):
        content = bytearray((old / name).read_bytes())
        content[100] ^= 1
        (old / name).write_bytes(content)
    build.export(model, old, targets=BOTH, recipe=ORT, context=CONTEXT, force=True)
    assert [step for step in work if step.startswith("lower")] == ["lower onnx"]
    assert "golden reference" in work and "golden xnnpack" in work
    assert contents(old) == contents(made)


CALIBRATED = replace(RECIPES["int4"], calibration_tokens=2048)


def test_codes_are_cached_and_shared(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Checkpoint
) -> None:
    """Between runs, targets and options of targets; not where a file of the cache was damaged."""
    monkeypatch.setenv(calibration_cache.VARIABLE, str(tmp_path / "cache"))
    chosen: list[int] = []
    quantize_layer = calibrate._quantize_layer

    def counted(model: Any, index: int, *rest: Any) -> Any:
        chosen.append(index)
        return quantize_layer(model, index, *rest)

    monkeypatch.setattr(calibrate, "_quantize_layer", counted)

    def export(name: str, target: str, recipe: Recipe) -> dict[str, str]:
        output = tmp_path / name / "b.edgellama"
        output.parent.mkdir()
        build.export(model, output, targets=[target], recipe=recipe, context=CONTEXT, validate=False)
        return json.loads((output / "reports/export.json").read_text())["codes"]  # type: ignore[no-any-return]

    first = export("first", "xnnpack", CALIBRATED)
    assert chosen == [0]
    assert export("second", "onnx", replace(CALIBRATED, onnx_form="portable")) == first
    assert chosen == [0]
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)
    assert export("third", "xnnpack", CALIBRATED) == first
    assert chosen == [0, 0] and file.read_bytes() != content
    monkeypatch.setenv(calibration_cache.VARIABLE, calibration_cache.OFF)
    assert export("fourth", "xnnpack", CALIBRATED) == first
    assert chosen == [0, 0, 0]


def test_a_cache_that_cannot_be_written_is_no_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(calibration_cache.VARIABLE, "/proc/edgellama")
    opened = open_checkpoint(model)
    read = calibration(opened, CALIBRATED, CONTEXT)
    assert read is not None
    store = LayerStore.of(opened, CALIBRATED, read)
    quantized_llama(opened, CALIBRATED, CONTEXT, calibrated_on=read, store=store)
    assert store.directory is None


def test_the_cache_keeps_to_its_size(tmp_path: Path) -> None:
    """What was used longest ago goes first; what is in use stays, whatever its size."""
    for age, name in enumerate(("new", "middle", "old", "ours")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.safetensors").write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    calibration_cache.trim(tmp_path, tmp_path / "ours", limit=400)
    assert len(list(tmp_path.iterdir())) == 4
    calibration_cache.trim(tmp_path, tmp_path / "ours", limit=399)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "middle", "ours"}
    calibration_cache.touch(tmp_path / "middle")
    calibration_cache.trim(tmp_path, tmp_path / "ours", limit=250)
    assert {path.name for path in tmp_path.iterdir()} == {"middle", "ours"}
    calibration_cache.trim(tmp_path, tmp_path / "ours", limit=0)
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}
    calibration_cache.trim(tmp_path / "nowhere", tmp_path / "nowhere" / "a")


def test_every_option_of_a_target_is_named(tiny_checkpoint: Checkpoint) -> None:
    from edgellama.recipe import TARGET_OPTIONS

    assert {option for target in TARGETS.values() for option in target.options} == set(TARGET_OPTIONS)
