"""Tests of `export`: a bundle appears complete and validated under its name, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edgellama
import edgellama.commands.validate
import edgellama.export.pipeline
import edgellama.runtimes.load
from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.commands import export_phases
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.errors import (
    CheckFailed,
    CheckpointError,
    EdgellamaError,
    Inconclusive,
    RecipeError,
    UsageError,
)
from edgellama.export.plan import make_plan
from edgellama.export.xnnpack import lower
from edgellama.files import file_sha256
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.recipe import RECIPES, PerGroup, Recipe, Rule, Scheme
from edgellama.targets import TARGETS, find_target
from edgellama.targets.provenance import Provenance
from edgellama.targets.sizes import planned_bytes
from tests.helpers.paths import ROOT, TINY
from tests.helpers.tiny_models import CONTEXT, Cut, copy_bound, write_hf

MakeCut = Callable[[int, str], Cut]


@pytest.fixture
def one_layer(tiny_checkpoint: Checkpoint) -> Checkpoint:
    return tiny_checkpoint.first_layers(1)


@pytest.fixture
def copy_instead_of_lowering(cut: MakeCut, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`copy_instead_of_lowering(recipe)`: lowering copies the artifact of the session's cut of one layer."""

    def replace_lowering(recipe: str) -> None:
        lowered = cut(1, recipe).path

        def copy_artifact(model: Llama, path: Path, provenance: Provenance, *, progress: Progress) -> None:
            copy_bound(lowered, path, provenance)

        monkeypatch.setattr(lower, "lower_to_xnnpack", copy_artifact)

    return replace_lowering


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of every file, by path."""
    files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
    return {str(file.relative_to(directory)): file_sha256(file) for file in files}


def test_files_and_manifest_of_a_bundle(tiny_bundle: Bundle, tiny_checkpoint: Checkpoint) -> None:
    manifest: Any = tiny_bundle.manifest
    assert sorted(contents(tiny_bundle.path)) == [
        "golden/golden.json",
        *(
            f"golden/{model}.{part}.bin"
            for model in ("reference", "xnnpack")
            for part in ("ids", "logp", "rest")
        ),
        "manifest.json",
        "reports/build.json",
        "reports/export.json",
        "reports/validate-xnnpack.json",
        "tokenizer/chat_template.jinja",
        "tokenizer/generation_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "xnnpack/model.pte",
    ]
    assert tiny_bundle.problems() == []
    assert manifest["schema"] == "edgellama.bundle/1" and manifest["name"] == "tiny"
    assert manifest["source"]["sha256"] == tiny_checkpoint.sha256()
    assert manifest["source"]["parameters"] == tiny_checkpoint.config.parameters
    assert tiny_bundle.config == tiny_checkpoint.config
    assert tiny_bundle.recipe == RECIPES["int4-fast"]
    assert tiny_bundle.context_length == CONTEXT
    (artifact,) = manifest["artifacts"]
    assert artifact["bytes"] == (tiny_bundle.path / artifact["path"]).stat().st_size
    assert {(g["scheme"], g["group_size"], g["tensors"]) for g in artifact["quantization"]} == {
        ("int4", 32, 16),  # qkv, o, gate with up, down
        ("int8", None, 1),
    }
    report = json.loads((tiny_bundle.path / "reports/validate-xnnpack.json").read_text())
    accuracy = manifest["accuracy"]["xnnpack"]
    assert accuracy["verdict"] == report["verdict"] == "pass"
    assert accuracy["kl_mean"] == report["quality"]["kl_mean"] < 0.05
    tensors = json.loads((tiny_bundle.path / "reports/export.json").read_text())["tensors"]
    assert {t["name"] for t in tensors} == {*tiny_checkpoint.config.tensor_shapes(), "lm_head.weight"}
    assert all(t["sqnr_db"] > 15 for t in tensors if t["bits"] < 32)
    assert manifest["chat"]["format"] is not None


def test_no_file_of_a_bundle_holds_a_local_path(tiny_bundle: Bundle) -> None:
    local_paths = [str(tiny_bundle.path.parent), str(TINY), str(Path.home())]
    for file in tiny_bundle.path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not [path for path in local_paths if path.encode() in content], file


@pytest.mark.slow
def test_the_same_checkpoint_gives_the_same_bytes(
    cut: MakeCut, copy_instead_of_lowering: Callable[[str], None], tmp_path: Path
) -> None:
    """The second export runs in another process, with another hash seed, from and to other places."""
    model = write_hf(cut(1, "int4-fast").checkpoint, tmp_path / "model")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    copy_instead_of_lowering("int4-fast")
    export(open_checkpoint(model), tmp_path / "one" / "cut.edgellama", recipe="int4-fast", context=CONTEXT)
    model = model.rename(tmp_path / "moved")
    options = ["-o", "cut.edgellama", "--context", "128", "--recipe", "int4-fast"]
    command = [sys.executable, "-m", "edgellama", "export", str(model), *options]
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
    done = subprocess.run(
        command, cwd=tmp_path / "two", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "verdict: pass" in done.stderr and done.stdout == ""
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
@pytest.mark.slow
def test_other_recipes_pass_the_gate(
    recipe: str, one_layer: Checkpoint, copy_instead_of_lowering: Callable[[str], None], tmp_path: Path
) -> None:
    copy_instead_of_lowering(recipe)
    bundle = export(one_layer, tmp_path / "cut.edgellama", recipe=recipe, context=CONTEXT)
    assert bundle.recipe.name == recipe
    kl = bundle.manifest["accuracy"]["xnnpack"]["kl_mean"]
    assert kl < 1e-9 if recipe == "fp32" else 1e-9 < kl < 0.01


@pytest.fixture
def no_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if lowering starts."""

    def fail(model: Llama, path: Path, provenance: Provenance, *, progress: Progress) -> None:
        pytest.fail("the slow part was started")

    monkeypatch.setattr(lower, "lower_to_xnnpack", fail)


G64 = Recipe(
    "g64", "does not divide", (Rule("model.embed_tokens", None), Rule("*", Scheme(4, PerGroup(64)))), 1.0, 1.0
)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": ["xnpack"]}, UsageError, "unknown target 'xnpack'"),
        ({"targets": []}, UsageError, "no target"),
        ({"recipe": "int5"}, UsageError, "unknown recipe 'int5'"),
        ({"recipe": "nowhere.json"}, RecipeError, r"nowhere\.json"),
        ({"recipe": G64}, RecipeError, r"down_proj .*have rows of 352"),
        ({"context": 513}, UsageError, "a context of 513 tokens"),
        ({"context": 0}, UsageError, "a context of 0 tokens"),
        (
            {"max_bytes": 200_000},
            CheckFailed,
            "size: the predicted xnnpack artifact has .* the limit is 200000",
        ),
        ({"max_kl": -0.1}, UsageError, "max_kl must lie in"),
        ({"max_kl": float("nan")}, UsageError, "max_kl must lie in"),
        ({"max_kl": 0.1, "validate": False}, UsageError, "validation was turned off"),
        ({"validation_tokens": 255}, UsageError, "at least 256"),
    ],
)
@pytest.mark.usefixtures("no_lowering")
def test_bad_options_are_refused_before_the_slow_part(
    options: dict[str, Any], error: type[EdgellamaError], message: str, one_layer: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        export(one_layer, tmp_path / "new.edgellama", **{"recipe": "int4-fast", **options})
    assert caught.value.remedy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_lowering")
def test_a_checkpoint_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        export(tmp_path / "nowhere", tmp_path / "new.edgellama")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_lowering")
def test_a_destination_that_is_not_free_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The refusal comes before the checkpoint is opened. Here it does not exist."""
    old_bundle = tmp_path / "old.edgellama"
    shutil.copytree(tiny_bundle.path, old_bundle)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"old\.edgellama exists") as caught:
        export("nowhere", old_bundle)
    assert "--force" in caught.value.remedy
    with pytest.raises(UsageError, match="no such directory"):
        export("nowhere", tmp_path / "no" / "new.edgellama")
    with pytest.raises(UsageError, match="is not a bundle; --force replaces bundles only"):
        export("nowhere", tmp_path, force=True)
    assert contents(tmp_path) == before


def test_the_limit_applies_to_the_predicted_size(
    one_layer: Checkpoint, tmp_path: Path, no_lowering: None
) -> None:
    limit = planned_bytes(one_layer.config, RECIPES["int4-fast"], TARGETS["xnnpack"].storage, CONTEXT)
    with pytest.raises(CheckFailed, match=f"{limit} bytes, the limit is {limit - 1}"):
        export(
            one_layer, tmp_path / "new.edgellama", recipe="int4-fast", context=CONTEXT, max_bytes=limit - 1
        )


def test_an_artifact_that_is_too_large_is_not_written(
    one_layer: Checkpoint, copy_instead_of_lowering: Callable[[str], None], cut: MakeCut, tmp_path: Path
) -> None:
    copy_instead_of_lowering("int4-fast")
    size = cut(1, "int4-fast").path.stat().st_size
    with pytest.raises(CheckFailed, match=f"the xnnpack artifact has {size} bytes"):
        export(one_layer, tmp_path / "new.edgellama", recipe="int4-fast", context=CONTEXT, max_bytes=size - 1)
    assert list(tmp_path.iterdir()) == []
    bundle = export(
        one_layer, tmp_path / "new.edgellama", recipe="int4-fast", context=CONTEXT, max_bytes=size
    )
    assert bundle.manifest["artifacts"][0]["bytes"] == size


def test_a_failed_gate_leaves_no_bundle(
    one_layer: Checkpoint, copy_instead_of_lowering: Callable[[str], None], tmp_path: Path
) -> None:
    copy_instead_of_lowering("int4-fast")
    with pytest.raises(CheckFailed, match=r"quality\.kl is .*, limit 1e-06") as caught:
        export(one_layer, tmp_path / "new.edgellama", recipe="int4-fast", context=CONTEXT, max_kl=1e-6)
    assert caught.value.exit_code == 1 and "--max-kl" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_an_inconclusive_gate_leaves_no_bundle(
    one_layer: Checkpoint,
    copy_instead_of_lowering: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy_instead_of_lowering("int4-fast")

    def inconclusive(*args: Any, **options: Any) -> Any:
        report = validate(*args, **options)
        return replace(report, checks=tuple(replace(c, verdict="inconclusive") for c in report.checks))

    monkeypatch.setattr(export_phases, "validate", inconclusive)
    with pytest.raises(Inconclusive) as caught:
        export(one_layer, tmp_path / "new.edgellama", recipe="int4-fast", context=CONTEXT)
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def interrupt(*args: Any, **options: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("phase", ["lower", "validate"])
def test_an_interruption_leaves_the_destination_unchanged(
    phase: str,
    force: bool,
    one_layer: Checkpoint,
    tiny_bundle: Bundle,
    copy_instead_of_lowering: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "cut.edgellama"
    if force:
        shutil.copytree(tiny_bundle.path, output)
    before = contents(tmp_path)
    copy_instead_of_lowering("int4-fast")
    if phase == "lower":
        monkeypatch.setattr(lower, "lower_to_xnnpack", interrupt)
    else:
        monkeypatch.setattr(export_phases, "validate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(one_layer, output, recipe="int4-fast", context=CONTEXT, force=force)
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["cut.edgellama"] if force else [])


def test_force_replaces_the_old_bundle_only_after_the_gate_has_passed(
    one_layer: Checkpoint,
    tiny_bundle: Bundle,
    cut: MakeCut,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "cut.edgellama"
    shutil.copytree(tiny_bundle.path, output)
    before, observed = contents(output), []
    lowered = cut(1, "fp32").path

    def observe_and_lower(model: Llama, path: Path, provenance: Provenance, *, progress: Progress) -> None:
        observed.append(contents(output))
        copy_bound(lowered, path, provenance)

    def observe_and_validate(*args: Any, **options: Any) -> Any:
        observed.append(contents(output))
        return validate(*args, **options)

    monkeypatch.setattr(lower, "lower_to_xnnpack", observe_and_lower)
    monkeypatch.setattr(export_phases, "validate", observe_and_validate)
    bundle = export(one_layer, output, recipe="fp32", context=CONTEXT, force=True)
    assert observed == [before, before]
    assert bundle.recipe.name == "fp32" and bundle.problems() == []
    assert list(tmp_path.iterdir()) == [output]


def test_without_validation_there_is_no_accuracy(
    one_layer: Checkpoint, copy_instead_of_lowering: Callable[[str], None], tmp_path: Path
) -> None:
    copy_instead_of_lowering("int4-fast")
    bundle = export(
        one_layer, tmp_path / "new.edgellama", recipe="int4-fast", context=CONTEXT, validate=False
    )
    assert bundle.manifest["accuracy"] == {}
    assert not list((bundle.path / "reports").glob("validate-*"))


def test_a_recipe_file_is_stored_unchanged(
    one_layer: Checkpoint, copy_instead_of_lowering: Callable[[str], None], tmp_path: Path
) -> None:
    mine = replace(RECIPES["int4-fast"], name="mine", summary="für uns")
    (tmp_path / "mine.json").write_text(json.dumps(mine.to_dict()), encoding="utf-8")
    copy_instead_of_lowering("int4-fast")
    bundle = export(
        one_layer,
        tmp_path / "new.edgellama",
        recipe=str(tmp_path / "mine.json"),
        context=CONTEXT,
        targets=["xnnpack", "xnnpack"],
        validate=False,
    )
    assert Bundle.open(bundle.path).recipe == mine
    assert bundle.targets == ["xnnpack"]


def test_the_default_context_is_that_of_the_model(tiny_checkpoint: Checkpoint) -> None:
    target = [find_target("xnnpack")]
    plan = make_plan(tiny_checkpoint, RECIPES["fp32"], target, None)
    assert plan.context_length == 512
    long = replace(tiny_checkpoint, config=replace(tiny_checkpoint.config, max_position_embeddings=131072))
    assert make_plan(long, RECIPES["fp32"], target, None).context_length == 2048
    assert make_plan(long, RECIPES["fp32"], target, 4096).context_length == 4096


def test_the_verbs_are_functions_and_packages(
    tiny_bundle: Bundle,
    copy_instead_of_lowering: Callable[[str], None],
    one_layer: Checkpoint,
    tmp_path: Path,
) -> None:
    """The imports above bind the modules of the verbs as attributes of `edgellama`, which must not hide the verbs."""
    assert sys.modules["edgellama.export"] is edgellama.export  # type: ignore[comparison-overlap]
    copy_instead_of_lowering("int4-fast")
    bundle = edgellama.export(
        one_layer, tmp_path / "new.edgellama", recipe="int4-fast", context=CONTEXT, validate=False
    )
    assert edgellama.validate(tiny_bundle).passed
    with edgellama.load(bundle, target="xnnpack") as runtime, edgellama.load_reference(TINY) as reference:
        assert runtime.forward([1, 2]).shape == reference.forward([1, 2]).shape == (512,)
        assert (runtime.context_length, reference.context_length) == (CONTEXT, 512)
    with pytest.raises(AttributeError, match="no attribute 'exports'"):
        _ = edgellama.exports


def test_the_manifest_is_written_last(
    one_layer: Checkpoint, copy_instead_of_lowering: Callable[[str], None], tmp_path: Path
) -> None:
    """Its hashes cover every other file, including the report of the gate."""
    copy_instead_of_lowering("int4-fast")
    bundle = export(one_layer, tmp_path / "new.edgellama", recipe="int4-fast", context=CONTEXT)
    assert set(bundle.manifest["files"]) == set(contents(bundle.path)) - {MANIFEST}
    assert "reports/validate-xnnpack.json" in bundle.manifest["files"]
