"""Bundles with adapters that are switched at run time: their files, their gate, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import edgellama
from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.cli.dispatch import main
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.errors import BundleError, CheckpointError, InputError, UsageError
from edgellama.files import to_json
from edgellama.gate.parity import steps
from edgellama.recipe import RECIPES
from edgellama.report import Report
from tests.helpers.adapters import adapter_of_all, write_adapter
from tests.helpers.paths import TINY
from tests.helpers.tiny_models import write_hf

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {"recipe": "int4-fast", "context": 64, "max_kl": 1.0, "validation_tokens": 256}
TARGETS = ("onnx", "gguf")
TOKENS = [(37 * i + 11) % 512 for i in range(24)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(open_checkpoint(TINY).first_layers(1), tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    checkpoint = open_checkpoint(base)
    return {
        "style": adapter_of_all(checkpoint, directory / "peft-style"),
        "facts": write_adapter(directory / "peft-facts"),
    }


@pytest.fixture(scope="module")
def bundle(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Base and two adapters for both targets, exported and validated. Read-only."""
    output = tmp_path_factory.mktemp("bundle") / "b.edgellama"
    return export(base, output, targets=TARGETS, swappable_adapters=adapters, **OPTIONS)


def test_the_manifest_names_each_adapter_with_its_base(
    bundle: Bundle, base: Path, adapters: dict[str, Path]
) -> None:
    entries = {entry["name"]: entry for entry in bundle.manifest["adapters"]}
    assert list(entries) == ["style", "facts"]
    assert (
        entries["style"]["base_sha256"]
        == open_checkpoint(base).sha256()
        == bundle.manifest["source"]["sha256"]
    )
    assert (
        entries["facts"]["modules"] == ["model.layers.0.self_attn.q_proj"] and entries["facts"]["rank"] == 2
    )
    assert entries["style"]["files"] == {"onnx": "adapters/style.onnx_adapter", "gguf": "adapters/style.gguf"}
    assert {*entries["style"]["files"].values()} <= bundle.manifest["files"].keys()
    assert bundle.problems() == []
    assert adapters["style"].name not in json.dumps(bundle.manifest), "no name of a directory is in it"


@pytest.mark.parametrize("target", TARGETS)
def test_one_process_switches_them(target: str, bundle: Bundle) -> None:
    with edgellama.load(bundle, target) as runtime:
        base = steps(runtime, TOKENS)
        style = steps(runtime.use("style"), TOKENS)
        facts = steps(runtime.use("facts"), TOKENS)
        assert not torch.equal(base, style) and not torch.equal(style, facts)
        assert torch.equal(steps(runtime.use(None), TOKENS), base)


def report(
    bundle: Bundle, base: Path | Checkpoint, adapters: dict[str, Path], target: str = "onnx"
) -> Report:
    reference = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    return validate(
        bundle, reference=reference, target=target, tokens=256, max_kl=1.0, swappable_adapters=adapters
    )


def failures(found: Report) -> dict[str, str]:
    return {c.name: c.detail for c in found.checks if c.verdict != "pass"}


@pytest.mark.parametrize("target", TARGETS)
def test_validate_judges_each_of_them(
    target: str, bundle: Bundle, base: Path, adapters: dict[str, Path]
) -> None:
    found = report(bundle, base, adapters, target)
    assert failures(found) == {}
    style, facts = found.adapters
    assert style["kl_mean"] < 0.2 < style["without"]["kl_mean"]
    assert style["bytes"] == (bundle.path / bundle.manifest["adapters"][0]["files"][target]).stat().st_size
    names = {c.name for c in found.checks if c.name.startswith("adapters.style")}
    assert names >= {f"adapters.style.{n}" for n in ("kl", "parity_kl", "file", "function", "basis", "owner")}
    assert f"style: KL {style['kl_mean']:.4f}" in found.to_text()
    assert facts["name"] == "facts" and found.to_dict()["adapters"][1]["judged"]


def test_adapters_that_were_not_given_are_named(
    bundle: Bundle, base: Path, adapters: dict[str, Path]
) -> None:
    found = report(bundle, base, {"style": adapters["style"]})
    assert failures(found) == {} and "not compared: facts" in found.to_text()
    alone = validate(bundle)
    assert alone.passed and {"adapters.style.owner", "adapters.facts.owner"} <= {c.name for c in alone.checks}


def test_a_directory_of_another_adapter_is_refused(
    bundle: Bundle, base: Path, adapters: dict[str, Path]
) -> None:
    with pytest.raises(InputError, match="is not the adapter"):
        report(bundle, base, {"style": adapters["facts"]})
    with pytest.raises(InputError, match=r"no adapter 'other' \(it has style, facts\)"):
        report(bundle, base, {"other": adapters["facts"]})
    with pytest.raises(UsageError, match="without their base"):
        validate(bundle, swappable_adapters=adapters)


def test_a_base_without_adapters_has_the_bytes_that_it_always_had(
    bundle: Bundle, base: Path, tmp_path: Path
) -> None:
    """The GGUF base is the same file. The ONNX base has optional inputs, which a plain one has not."""
    plain = export(
        base, tmp_path / "b.edgellama", targets=TARGETS, **(OPTIONS | {"validate": False, "max_kl": None})
    )
    assert "adapters" not in plain.manifest
    assert plain.artifact_sha256("gguf") == bundle.artifact_sha256("gguf")
    assert b"lora" not in (plain.artifact("onnx") / "model.onnx").read_bytes()
    for name in ("model.onnx.data", "genai_config.json"):
        assert (plain.artifact("onnx") / name).read_bytes() == (bundle.artifact("onnx") / name).read_bytes()
    with edgellama.load(bundle, "onnx") as ours, edgellama.load(plain, "onnx") as theirs:
        assert torch.equal(steps(ours, TOKENS), steps(theirs, TOKENS))


def test_an_export_with_the_same_adapters_is_up_to_date(
    bundle: Bundle, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    assert (
        export(base, bundle.path, targets=TARGETS, swappable_adapters=adapters, **OPTIONS).path == bundle.path
    )
    for others in (
        {},
        {"style": adapters["style"]},
        {"style": adapters["facts"], "facts": adapters["style"]},
    ):
        with pytest.raises(UsageError, match="other swappable adapters"):
            export(base, bundle.path, targets=TARGETS, swappable_adapters=others, **OPTIONS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": ("onnx", "xnnpack")}, "target 'xnnpack' cannot switch adapters"),
        ({"swappable_adapters": ["style"]}, "expected NAME=DIR"),
        ({"swappable_adapters": ["Style=x"]}, "no name for an adapter"),
        ({"swappable_adapters": ["a=x", "a=y"]}, "given twice"),
        ({"adapters": ["x"]}, "a bundle has one kind"),
    ],
)
def test_refusals_before_anything_slow(
    changes: dict[str, Any], words: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    options = OPTIONS | {"targets": ("onnx",), "swappable_adapters": adapters} | changes
    with pytest.raises(UsageError, match=words):
        export(base, tmp_path / "b.edgellama", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_no_runtime_switches_is_refused(base: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", base_model_name_or_path="x", bias="lora_only", seed=3)
    saved = {**_tensors(path), "base_model.model.model.norm.weight": torch.ones(128)}
    path = write_adapter(tmp_path / "whole", saved, modules_to_save=["norm"])
    with pytest.raises(CheckpointError, match="a whole module was trained") as caught:
        export(base, tmp_path / "b.edgellama", targets=["onnx"], swappable_adapters={"a": path}, **OPTIONS)
    assert "--adapter" in str(caught.value.remedy)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "adapter_model.safetensors")


def test_a_calibrated_recipe_folds_and_the_adapter_follows(base: Path, tmp_path: Path) -> None:
    """`recover` folds, and trains norms and scales. The folds are restored from the bundle for `validate`."""
    recipe = replace(RECIPES["int4"], name="ours", rotation="hidden", calibration_tokens=2048)
    checkpoint = open_checkpoint(base)
    adapters = {"style": adapter_of_all(checkpoint, tmp_path / "style", size=0.01)}
    options = OPTIONS | {"recipe": recipe}
    made = export(base, tmp_path / "b.edgellama", targets=["onnx"], swappable_adapters=adapters, **options)
    assert "reports/folds.safetensors" in made.manifest["files"]
    found = report(made, base, adapters)
    assert failures(found) == {}


@pytest.mark.parametrize("claimed", ["rank", "sha256", "no adapters"])
def test_the_manifest_s_word_is_not_taken(
    claimed: str, bundle: Bundle, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "b.edgellama"
    shutil.copytree(bundle.path, copy)
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    if claimed == "no adapters":
        del manifest["adapters"]
    else:
        manifest["adapters"][0][claimed] = 7 if claimed == "rank" else "0" * 64
    (copy / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    altered = Bundle.open(copy)
    if claimed == "sha256":
        with pytest.raises(InputError, match="is not the adapter"):
            report(altered, base, adapters)
        return
    found = failures(report(altered, base, {} if claimed == "no adapters" else {"style": adapters["style"]}))
    assert ("structure.layout" if claimed == "no adapters" else "adapters.style.manifest") in found, found


def test_the_command_line(
    bundle: Bundle, base: Path, adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [part for name, path in adapters.items() for part in ("--adapters", f"{name}={path}")]
    limits = ["--tokens", "256", "--max-kl", "1", "-t", "gguf"]
    assert main(["validate", str(bundle.path), "--reference", str(base), *limits, *given]) == 0
    assert "adapters.facts.kl" in capsys.readouterr().out
    answers = []
    for use in ([], ["--use", "style"]):
        assert main(["run", str(bundle.path), "-t", "onnx", "-p", "Once upon a time", "-n", "8", *use]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]
    assert main(["run", str(bundle.path), "-p", "a", "--use", "other"]) == 2


def test_onnxruntime_genai_switches_them_too(bundle: Bundle) -> None:
    """`og.Adapters` on the unchanged files generates what `use` does, token for token, with one loaded model."""
    import onnxruntime_genai as og

    model = og.Model(str(bundle.path / "onnx"))
    adapters = og.Adapters(model)
    for name, path in bundle.adapter_files("onnx").items():
        adapters.load(str(path), name)
    ids = bundle.tokenizer.encode("She was")
    answers: dict[str | None, list[int]] = {}
    with edgellama.load(bundle, "onnx") as runtime:
        for used in ("style", None, "facts"):
            parameters = og.GeneratorParams(model)
            parameters.set_search_options(max_length=len(ids) + 12)
            generator = og.Generator(model, parameters)
            if used is not None:
                generator.set_active_adapter(adapters, used)
            generator.append_tokens(ids)
            theirs: list[int] = []
            while not generator.is_done():
                generator.generate_next_token()
                theirs.append(int(generator.get_next_tokens()[0]))
            logits, ours = runtime.use(used).forward(ids), []
            for _ in theirs:
                ours.append(int(logits.argmax()))
                logits = runtime.forward(ours[-1:])
            answers[used] = theirs
            assert ours == theirs and len(theirs) > 1
    assert answers["style"] != answers[None]


def test_an_adapter_that_the_model_or_the_bundle_does_not_have(
    bundle: Bundle, base: Path, tmp_path: Path
) -> None:
    """A manifest that was written by hand ends in an error of its own, and in no crash."""
    faults: dict[str, tuple[str, Any]] = {
        "which the model does not have": ("modules", ["model.layers.7.self_attn.q_proj"]),
        "is not among its files": ("files", {"onnx": "adapters/other.onnx_adapter"}),
    }
    for number, (words, (key, value)) in enumerate(faults.items()):
        copy = tmp_path / f"{number}.edgellama"
        shutil.copytree(bundle.path, copy)
        manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
        manifest["adapters"][0][key] = value
        (copy / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
        with pytest.raises(BundleError, match=words):
            report(Bundle.open(copy), base, {})
