"""Planted faults in what a bundle says about itself, each found by the check that is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellama.bundle.golden import FILE as GOLDEN
from edgellama.checkpoints import Checkpoint
from edgellama.commands.export import export
from edgellama.errors import RecipeError
from edgellama.gate.limits import recipe_limit
from edgellama.recipe import RECIPES, Recipe, altered_fields
from tests.helpers.altered_bundles import Alter, altered, edit_array, edit_file, edit_manifest
from tests.helpers.one_layer_bundle import CONTEXT, Sound, assert_found, failures, sound_bundle

pytestmark = pytest.mark.slow

EXPORT, BUILD, REPORT = "reports/export.json", "reports/build.json", "reports/validate-xnnpack.json"
TARGETS = ("xnnpack", "onnx", "coreml-pte")


@pytest.fixture(scope="module")
def sound(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return sound_bundle(tiny_checkpoint, tmp_path_factory.mktemp("claims"), TARGETS)


def section(name: str, **changes: Any) -> Alter:
    return edit_manifest(lambda data: data[name].update(changes))


def entry(number: int, edit: Callable[[Any], object]) -> Alter:
    return edit_manifest(lambda data: edit(data["artifacts"][number]))


def golden(edit: Callable[[Any], object]) -> Alter:
    return edit_file(GOLDEN, edit)


def both(*alters: Alter) -> Alter:
    def alter(bundle: Path) -> None:
        for one in alters:
            one(bundle)

    return alter


def loosen(data: Any) -> None:
    """The recipe's limit in the manifest and in the record of the build."""
    data["recipe"]["max_kl_small"] = 5.0


def better_report(data: Any) -> None:
    """Every figure of the report is improved alike, windows included."""
    data["quality"]["kl_mean"] /= 2
    data["quality"]["kl_mean_ci95"] = [x / 2 for x in data["quality"]["kl_mean_ci95"]]
    for window in data["scored"]["windows"]:
        window["kl"] /= 2
    for check in data["checks"]:
        if check["name"] == "quality.kl":
            check["value"] /= 2


def better_accuracy(data: Any) -> None:
    accuracy = data["accuracy"]["xnnpack"]
    accuracy["kl_mean"] /= 2
    accuracy["kl_mean_ci95"] = [x / 2 for x in accuracy["kl_mean_ci95"]]


def raise_floor(data: Any) -> None:
    """A noise floor from which looser limits follow."""
    data["artifacts"]["xnnpack"]["noise_floor_kl_mean"] = 0.2
    data["artifacts"]["xnnpack"]["noise_floor_kl_sequence"] = 0.2
    data["limits"]["xnnpack"] = {"parity_kl_mean": 3 * 0.2, "parity_kl_sequence": 3 * 0.2}


def lower_all(rows: np.ndarray) -> None:
    """Probabilities that no longer add up to 1, from which every KL is 0."""
    rows -= 1.0


def flatten(rows: np.ndarray) -> None:
    """Probabilities that add up to 1, and another distribution of the recorded tokens."""
    total = np.exp(rows.astype(np.float64)).sum(-1, keepdims=True)
    rows[:] = np.log(total / rows.shape[1])


def exchange_best(rows: np.ndarray) -> None:
    rows[:, [0, 1]] = rows[:, [1, 0]]


FAULTS: list[tuple[str, Alter, str, str, str]] = [
    ("an eos id is lost", section("model", eos_token_ids=[2]), "onnx", "claims.manifest", "model.eos_token_ids is [2], expected [2, 0]"),
    ("another bos id", section("model", bos_token_id=5), "xnnpack", "claims.manifest", "model.bos_token_id is 5"),
    ("no bos id", section("model", bos_token_id=None), "onnx", "claims.manifest", "model.bos_token_id is None"),
    ("another licence", section("source", license="MIT"), "xnnpack", "claims.manifest", "source.license is 'MIT'"),
    ("more parameters", section("source", parameters=10**9), "coreml-pte", "claims.manifest", "source.parameters is 1000000000"),
    ("another format of the source", section("source", format="gguf"), "xnnpack", "claims.manifest", "source.format is 'gguf'"),
    ("another rope_theta", section("model", rope_theta=500000.0), "xnnpack", "claims.manifest", "model.rope_theta is 500000.0"),
    ("another epsilon", section("model", rms_norm_eps=1e-6), "onnx", "claims.manifest", "model.rms_norm_eps is 1e-06"),
    ("a longer model", section("model", max_position_embeddings=99999), "xnnpack", "claims.manifest", "model.max_position_embeddings is 99999"),
    ("another intermediate size", section("model", intermediate_size=353), "coreml-pte", "claims.manifest", "model.intermediate_size is 353"),
    ("a looser KL limit", both(edit_manifest(loosen), edit_file(BUILD, lambda d: loosen(d["inputs"]))), "xnnpack", "claims.recipe", "max_kl_small is 5.0"),
    ("another summary of the recipe", both(section("recipe", summary="lossless"), edit_file(BUILD, lambda d: d["inputs"]["recipe"].update(summary="lossless"))), "onnx", "claims.recipe", "summary is 'lossless'"),
    ("another range of lengths", entry(0, lambda e: e["inputs"][0].update(range=[1, 4096])), "xnnpack", "claims.artifact", "artifact.inputs[0].range is [1, 4096]"),
    ("another type of the logits", entry(1, lambda e: e["outputs"][0].update(dtype="float16")), "onnx", "claims.artifact", "artifact.outputs[0].dtype is 'float16'"),
    ("another constant method", entry(0, lambda e: e["methods"].update(get_eos_ids=[2])), "xnnpack", "claims.artifact", "artifact.methods.get_eos_ids is [2]"),
    ("an operator that is not required", entry(0, lambda e: e["requires"].update(operators=[])), "xnnpack", "claims.artifact", "artifact.requires.operators is []"),
    ("an older runtime", entry(1, lambda e: e["requires"].update(min_version="1.0.0")), "onnx", "claims.artifact", "artifact.requires.min_version is '1.0.0'"),
    ("an older OS", entry(2, lambda e: e["requires"].update(min_os={"ios": "12"})), "coreml-pte", "claims.artifact", "artifact.requires.min_os"),
    ("float weights are promised", entry(2, lambda e: e["quantization"][0].update(scheme="int2")), "coreml-pte", "claims.artifact", "artifact.quantization[0].scheme"),
    ("less memory", entry(0, lambda e: e["memory"].update(peak_estimate=1)), "xnnpack", "claims.artifact", "artifact.memory.peak_estimate is 1"),
    ("fewer bytes", entry(1, lambda e: e.update(bytes=1)), "onnx", "claims.artifact", "artifact.bytes is 1"),
    ("other targets were asked for", edit_file(BUILD, lambda d: d["inputs"].update(targets=["onnx"])), "xnnpack", "claims.build", "targets is ['onnx']"),
    ("another version of torch", edit_file(BUILD, lambda d: d["inputs"]["tools"].update(torch="1.0")), "xnnpack", "claims.build", "tools.torch is '1.0'"),
    ("another context was asked for", edit_file(BUILD, lambda d: d["inputs"].update(context=16)), "xnnpack", "claims.build", "context is 16"),
    ("a tensor with a better SQNR", edit_file(EXPORT, lambda d: d["tensors"][-1].update(sqnr_db=80.0)), "xnnpack", "claims.tensors", "an SQNR of 80.0 dB"),
    ("a tensor of another scheme", edit_file(EXPORT, lambda d: d["tensors"][-1].update(scheme="float32")), "onnx", "claims.tensors", "export.tensors"),
    ("a tensor is left out", edit_file(EXPORT, lambda d: d["tensors"].pop()), "xnnpack", "claims.tensors", "export.tensors is"),
    ("a note is added", edit_file(EXPORT, lambda d: d["notes"].append("checked by hand")), "coreml-pte", "claims.tensors", "export.notes is"),
    ("a better accuracy in the manifest", edit_manifest(better_accuracy), "xnnpack", "claims.accuracy", "accuracy.xnnpack.kl_mean is"),
    ("the accuracy of a target is lost", edit_manifest(lambda d: d["accuracy"].pop("onnx")), "onnx", "claims.accuracy", "accuracy.onnx is missing"),
    ("a report about another checkpoint", edit_file(REPORT, lambda d: d["reference"].update(sha256="0" * 64)), "xnnpack", "claims.accuracy", "report.reference.sha256"),
    ("a report about another target", edit_file(REPORT, lambda d: d.update(target="onnx")), "xnnpack", "claims.accuracy", "report.target is 'onnx'"),
    ("a verdict against its checks", edit_file(REPORT, lambda d: d["checks"][0].update(verdict="fail")), "xnnpack", "claims.accuracy", "report.verdict is"),
    ("a better mean than the windows", both(edit_file(REPORT, lambda d: d["quality"].update(ppl_artifact=1.0)), edit_manifest(lambda d: d["accuracy"]["xnnpack"].update(ppl_artifact=1.0))), "xnnpack", "claims.accuracy", "report.quality.ppl_artifact is 1.0"),
    ("another limit in the report", edit_file(REPORT, lambda d: [c.update(limit=9.0) for c in d["checks"] if c["name"] == "quality.kl"]), "xnnpack", "claims.accuracy", "report.checks.quality.kl.limit is 9.0"),
    ("a report that agrees with itself alone", both(edit_file(REPORT, better_report), edit_manifest(better_accuracy)), "xnnpack", "claims.scores", "mean KL of 8 windows"),
    ("another text of a golden sequence", golden(lambda d: d["sequences"][0]["tokens"].__setitem__(0, 7)), "xnnpack", "golden.sequences", "golden.sequences[0].tokens"),
    ("fewer scored positions", golden(lambda d: d["sequences"][1].update(name="passage")), "onnx", "golden.sequences", "golden.sequences[1].name is 'passage'"),
    ("other probabilities of the reference", edit_array("reference.logp", lower_all), "xnnpack", "golden.reference", "do not add up to 1"),
    ("the reference's best tokens are exchanged", both(edit_array("reference.ids", exchange_best, "uint32"), edit_array("reference.logp", exchange_best)), "onnx", "golden.reference", "not in the order of their probability"),
    ("a token of the reference is repeated", edit_array("reference.ids", lambda rows: rows.__setitem__((slice(None), 1), rows[:, 0]), "uint32"), "xnnpack", "golden.reference", "a token is recorded twice"),
    ("probabilities of the artifact that do not add up", edit_array("xnnpack.logp", lower_all), "xnnpack", "golden.xnnpack", "do not add up to 1"),
    ("another rest of the artifact", edit_array("onnx.rest", lambda rows: rows.__iadd__(0.5)), "onnx", "golden.onnx", "do not add up to 1"),
    ("other probabilities of the reference that add up", edit_array("reference.logp", flatten), "xnnpack", "golden.reference", "worst of"),
    ("other probabilities of the artifact that add up", edit_array("onnx.logp", flatten), "onnx", "golden.onnx", "worst of"),
    ("a better KL in golden.json", golden(lambda d: d["artifacts"]["xnnpack"].update(kl_mean=0.0)), "xnnpack", "golden.accuracy", "artifacts.xnnpack.kl_mean is 0.0"),
    ("golden vectors of another artifact", golden(lambda d: d["artifacts"]["onnx"].update(sha256="0" * 64)), "onnx", "golden.accuracy", "artifacts.onnx.sha256"),
    ("a looser limit for devices", golden(lambda d: d["limits"]["xnnpack"].update(parity_kl_mean=9.0)), "xnnpack", "golden.limits", "limits.xnnpack.parity_kl_mean is 9.0"),
    ("a higher noise floor", golden(raise_floor), "xnnpack", "golden.limits", "noise_floor_kl_mean is 0.2"),
    ("looser limits for Core ML", golden(lambda d: d["limits"]["coreml-pte"].update(parity_kl_sequence=1.0)), "coreml-pte", "golden.limits", "limits.coreml-pte.parity_kl_sequence is 1.0"),
]  # fmt: skip

# Checks that a fault of the named kind fails as well.
ALSO = {
    # A model of other sizes needs other memory, and another record of calls.
    "claims.manifest": {"claims.artifact", "claims.accuracy", "structure.metadata", "structure.client_files", "structure.clients"},
    # The stored report kept to the sound recipe's limit, and ONNX models hold the recipe.
    "claims.recipe": {"claims.accuracy", "structure.metadata"},
    "golden.reference": {"golden.accuracy"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("alter", "target", "check", "detail"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_a_fault(alter: Alter, target: str, check: str, detail: str, sound: Sound, tmp_path: Path) -> None:
    bundle = altered(sound.bundle, tmp_path, alter)
    assert_found(bundle, sound, target, check, detail, ALSO.get(check, ()))


@pytest.mark.parametrize("target", TARGETS)
def test_a_sound_bundle_has_no_fault(target: str, sound: Sound) -> None:
    assert failures(sound.bundle, sound.checkpoint, target, max_kl=None) == {}
    assert failures(sound.bundle, None, target) == {}


@pytest.mark.parametrize(
    ("alter", "check"),
    [
        (edit_manifest(better_accuracy), "claims.accuracy"),
        (entry(0, lambda e: e["memory"].update(weights=1)), "claims.artifact"),
        (edit_file(BUILD, lambda d: d["inputs"].update(targets=["onnx"])), "claims.build"),
        (section("recipe", max_kl=0.2), "claims.recipe"),
    ],
)
def test_a_fault_is_found_without_the_checkpoint(
    alter: Alter, check: str, sound: Sound, tmp_path: Path
) -> None:
    assert check in failures(altered(sound.bundle, tmp_path, alter), None)


CALIBRATED = replace(RECIPES["int4"], name="int4-short", calibration_tokens=2048)


@pytest.fixture(scope="module")
def calibrated(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    one_layer = tiny_checkpoint.first_layers(1)
    path = tmp_path_factory.mktemp("calibrated") / "sound.edgellama"
    return Sound(one_layer, export(one_layer, path, recipe=CALIBRATED, context=CONTEXT, validate=False))


@pytest.mark.parametrize(
    ("edit", "detail"),
    [
        (lambda d: d["calibration"].update(sha256="0" * 64), "export.calibration.sha256"),
        (
            lambda d: d["calibration"]["texts"][0].update(sha256="0" * 64),
            "export.calibration.texts[0].sha256",
        ),
        (lambda d: d["calibration"].update(tokens=10**6), "export.calibration.tokens"),
        (lambda d: d.pop("calibration"), "export.calibration is missing"),
    ],
)
def test_another_calibration(
    edit: Callable[[Any], object], detail: str, calibrated: Sound, tmp_path: Path
) -> None:
    assert failures(calibrated.bundle, calibrated.checkpoint) == {}
    bundle = altered(calibrated.bundle, tmp_path, edit_file(EXPORT, edit))
    found = failures(bundle, calibrated.checkpoint)
    assert detail in found.get("claims.tensors", ""), found


def test_the_limit_of_a_recipe_is_not_the_bundles_word() -> None:
    small, own = 10**8, RECIPES["int4"]
    assert recipe_limit(own, small) == (own.max_kl_small, "edgellama's own limit of int4")
    assert recipe_limit(replace(own, max_kl_small=9.0), small)[0] == own.max_kl_small
    mine = replace(own, name="mine", max_kl_small=0.01)
    assert recipe_limit(mine, small) == (0.01, "the limit of the bundle's own recipe 'mine'")
    loosest = max(recipe.max_kl_small for recipe in RECIPES.values())
    limit, source = recipe_limit(replace(mine, max_kl_small=9.0), small)
    assert limit == loosest and "'mine' asks for 9, which needs --max-kl" in source


def test_another_recipe_under_a_name_of_edgellamas_is_refused(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="'int4' differs from edgellama's own 'int4' in calibration_tokens"):
        export(tiny_checkpoint, tmp_path / "x.edgellama", recipe=replace(CALIBRATED, name="int4"))
    chosen = replace(RECIPES["auto"], algorithm="gptq", rules=RECIPES["int8"].rules)
    assert altered_fields(chosen) == [] and altered_fields(RECIPES["auto"]) == []
    assert altered_fields(replace(chosen, max_kl=1.0)) == ["max_kl"]


@pytest.mark.parametrize("name", ["", " ", "\ud800"])
def test_a_recipe_without_a_name_that_a_manifest_can_hold_is_refused(name: str) -> None:
    data = RECIPES["int8"].to_dict() | {"name": name}
    with pytest.raises(RecipeError, match="name must not be blank"):
        Recipe.from_dict(json.loads(json.dumps(data)))
