"""Golden vectors and quality of processors that round otherwise than this machine, with planted faults."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from edgellama.bundle import Bundle
from edgellama.bundle.golden import FILE, REFERENCE, Golden, Rows, read_golden
from edgellama.checkpoints import Checkpoint
from edgellama.commands.challenge import Pair, with_response
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.gate.challenge import make_challenge, sequences_of
from edgellama.gate.device import judge
from edgellama.gate.golden import scored_logits
from edgellama.gate.references import QuantizedReference
from edgellama.gate.replay import replay
from edgellama.gate.subject import Section, report_of
from edgellama.recipe import RECIPES, Recipe
from edgellama.report import Report, check
from edgellama.targets import find_target
from edgellama.targets.onnx.target import OnnxTarget
from tests.helpers.altered_bundles import Alter, altered, edit_array, edit_file
from tests.helpers.device_logs import device_log, logits_of, noisy, response
from tests.helpers.paths import TINY

CONTEXT = 192
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
INT4 = RECIPES["int4-fast"]
ONNX = find_target("onnx")
FAMILIES = ("per-block", "per-row", "float")


def exported(path: Path, recipe: Recipe = INT4, checkpoint: Path = TINY) -> Bundle:
    return export(checkpoint, path, targets=["onnx"], recipe=recipe, context=CONTEXT, validate=False)


def replica_of(checkpoint: Checkpoint, golden: Golden) -> dict[str, list[Rows]]:
    """Logits of the replica of every family on the golden sequences."""
    model, _ = quantized_llama(checkpoint, INT4, CONTEXT)
    families = {family.name: family for family in ONNX.families(INT4)}
    return {
        name: scored_logits(QuantizedReference(model, INT4, ONNX, family), golden.sequences)
        for name, family in families.items()
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(tmp_path_factory.mktemp("families") / "tiny.edgellama")


@pytest.fixture(scope="module")
def golden(bundle: Bundle) -> Golden:
    return read_golden(bundle)


@pytest.fixture(scope="module")
def logits(tiny_checkpoint: Checkpoint, golden: Golden) -> dict[str, list[Rows]]:
    return replica_of(tiny_checkpoint, golden)


def gate(bundle: Bundle, checkpoint: Path = TINY, **options: Any) -> Report:
    return validate(bundle, reference=checkpoint, target="onnx", tokens=512, relower=False, **options)


def failed(report: Report) -> dict[str, str]:
    return {c.name: c.detail for c in report.checks if c.verdict == "fail"}


def mean_kl(golden: Golden, rows: Sequence[Rows]) -> float:
    return float(golden.expected["onnx"].kl(np.concatenate(rows)).mean())


def test_each_family_has_rows_and_limits_of_its_own(golden: Golden, logits: dict[str, list[Rows]]) -> None:
    assert (golden.family("onnx"), *golden.other_families("onnx")) in {
        FAMILIES,
        ("per-block", "float", "per-row"),
    }
    for name in FAMILIES:
        view = golden.for_family("onnx", name)
        own, *others = sorted(FAMILIES, key=lambda other: mean_kl(view, logits[other]))
        assert own == name, "each family is nearest to its own rows"
        assert mean_kl(view, logits[name]) <= view.limits("onnx")["parity_kl_mean"]
        assert view.expected[REFERENCE] is golden.expected[REFERENCE]
        assert others
    assert mean_kl(golden, logits["per-block"]) < 1e-3, "the replica of this machine is near its own kernels"


def test_the_rows_of_other_families_are_small(bundle: Bundle) -> None:
    bytes_of = {
        name: sum(f.stat().st_size for f in (bundle.path / "golden").glob(f"{name}.[ilr]*.bin"))
        for name in ("onnx", "onnx.per-row", "onnx.float")
    }
    assert bytes_of["onnx.per-row"] == bytes_of["onnx.float"] < 0.3 * bytes_of["onnx"]


@pytest.mark.parametrize(
    ("processor", "family"),
    [("x86-64", "per-block"), ("arm64-dotprod", "per-row"), ("arm64", "float"), ("riscv64", "per-block")],
)
def test_a_processor_finds_its_family(processor: str, family: str, golden: Golden) -> None:
    assert golden.family_of("onnx", processor) == family


@pytest.mark.parametrize(
    ("recipe", "families"),
    [
        (INT4, {"per-block": ["x86-64"], "per-row": ["arm64-dotprod"], "float": ["arm64"]}),
        (
            replace(INT4, onnx_rounding="per-block"),
            {"per-block": ["x86-64", "arm64-dotprod"], "float": ["arm64"]},
        ),
        (RECIPES["int8"], {"per-block": ["x86-64", "arm64-dotprod"], "float": ["arm64"]}),
        (replace(INT4, onnx_form="portable"), {}),
        (RECIPES["fp32"], {}),
    ],
)
def test_families_follow_from_the_recipe(recipe: Recipe, families: dict[str, list[str]]) -> None:
    assert {f.name: list(f.processors) for f in ONNX.families(recipe)} == families


def test_a_log_is_judged_by_the_family_that_it_names(
    bundle: Bundle, golden: Golden, logits: dict[str, list[Rows]]
) -> None:
    for family, rows in logits.items():
        view = golden.for_family("onnx", family)
        log = device_log(bundle, "onnx", rows, golden=view, family=family)
        checks = {c.name: c for c in judge(bundle, golden, log)}
        assert {c.verdict for c in checks.values()} == {"pass"}, family
        assert checks["device.family"].value == family
        assert checks["device.parity_kl"].limit == view.limits("onnx")["parity_kl_mean"]


def test_a_log_without_a_family_is_judged_as_the_hosts(
    bundle: Bundle, golden: Golden, logits: dict[str, list[Rows]]
) -> None:
    log = device_log(bundle, "onnx", logits["per-block"])
    assert "family" not in log
    checks = {c.name: c for c in judge(bundle, golden, log)}
    assert {c.verdict for c in checks.values()} == {"pass"}
    assert checks["device.family"].value == "per-block" and "not named" in checks["device.family"].detail


def test_a_log_of_another_family_than_it_names_or_of_none_fails(
    bundle: Bundle, golden: Golden, logits: dict[str, list[Rows]]
) -> None:
    # Floors as low as a tiny model's may give both families the target's own limits.
    other = replace(golden, data=copy.deepcopy(golden.data))
    limits = other.data["artifacts"]["onnx"]["families"]["per-row"]["limits"]
    limits |= {name: 2 * limit for name, limit in limits.items()}
    view = other.for_family("onnx", "float")
    log = device_log(bundle, "onnx", logits["per-row"], golden=view, family="per-row")
    assert "device.summary" in {c.name for c in judge(bundle, other, log) if c.verdict == "fail"}
    log = device_log(bundle, "onnx", logits["per-block"], family="per-column")
    assert "device.family" in {c.name for c in judge(bundle, golden, log) if c.verdict == "fail"}


def test_an_arm_host_names_its_family(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = next(family for family in ONNX.families(INT4) if family.name == "per-row")
    monkeypatch.setattr(OnnxTarget, "family_here", lambda self, recipe: arm)
    log = replay(bundle, "onnx")
    assert log["family"] == "per-row"
    limits = {c["name"]: c["limit"] for c in log["checks"]}
    view = read_golden(bundle).for_family("onnx", "per-row")
    assert limits["parity_kl_sequence"] == view.limits("onnx")["parity_kl_sequence"]


@pytest.mark.slow
def test_an_answer_of_another_family_is_judged_by_its_replica(
    bundle: Bundle, tiny_checkpoint: Checkpoint
) -> None:
    made = make_challenge(bundle, "onnx", nonce="7a" * 32, now=NOW, lifetime=timedelta(days=1))
    asked = replace(read_golden(bundle), sequences=tuple(sequences_of(made)))
    rows = noisy(replica_of(tiny_checkpoint, asked)["per-row"], 1e-5)
    sections = [Section((check("structure.files", True),))]
    reports = [report_of(ONNX, "not run", None, sections)]

    def judged(checkpoint: Checkpoint | None, **changes: Any) -> dict[str, str]:
        pair = Pair(made, response(bundle, made, rows, **changes))
        (report,) = with_response(bundle, reports, pair, checkpoint, now=NOW)
        return {c.name: c.detail for c in report.checks if c.verdict == "fail"}

    assert judged(tiny_checkpoint, family="per-row") == {}
    assert list(judged(None, family="per-row")) == ["challenge.family"], "only the quantized model knows it"
    assert list(judged(tiny_checkpoint, family="per-column")) == ["challenge.family"]


def drop_families(data: dict[str, Any]) -> None:
    for key in ("family", "families"):
        data["artifacts"]["onnx"].pop(key)
    for name in [name for name in data["arrays"] if name.count(".") == 2]:
        data["arrays"].pop(name)


def older(bundle: Path) -> None:
    """Golden vectors as they were before families."""
    edit_file(FILE, drop_families)(bundle)
    for file in (bundle / "golden").glob("onnx.*.*.bin"):
        file.unlink()


@pytest.mark.slow
def test_the_gate_judges_families_and_older_bundles(bundle: Bundle, tmp_path: Path) -> None:
    report = gate(bundle)
    names = {c.name for c in report.checks}
    assert report.passed, report.to_text()
    assert {"golden.families", "golden.onnx.per-row", "golden.onnx.float", "quality.kl_per_row"} <= names
    figures = report.quality["families"]["per-row"]
    assert figures["kl_mean"] == pytest.approx(report.quality["kl_mean"], rel=0.2)
    assert figures["kl_mean"] != report.quality["kl_mean"]
    old = altered(bundle, tmp_path, older)
    assert read_golden(old).family_of("onnx", "arm64-dotprod") is None
    report = gate(old)
    assert report.passed, report.to_text()
    assert "older bundle" in next(c.detail for c in report.checks if c.name == "golden.families")
    log = device_log(old, "onnx", logits_of(old, "onnx", read_golden(old).sequences))
    assert {c.verdict for c in judge(old, read_golden(old), log)} == {"pass"}


def scale_rows(array: np.ndarray) -> None:
    """Moves probability from the best token to the second, in every row of log-probabilities."""
    total = np.logaddexp(array[:, 0], array[:, 1])
    array[:, 0] = array[:, 1] = total - np.log(2)


def raise_limits(data: dict[str, Any]) -> None:
    family = data["artifacts"]["onnx"]["families"]["per-row"]
    for kind in ("mean", "sequence"):
        family[f"noise_floor_kl_{kind}"] = 0.5
        family["limits"][f"parity_kl_{kind}"] = 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alter", "name"),
    [
        (edit_array("onnx.per-row.logp", scale_rows), "golden.onnx.per-row"),
        (edit_file(FILE, raise_limits), "golden.onnx.per-row"),
        (
            edit_file(
                FILE,
                lambda d: d["artifacts"]["onnx"]["families"]["float"].update(processors=["arm64-dotprod"]),
            ),
            "golden.families",
        ),
        (edit_file(FILE, lambda d: d["artifacts"]["onnx"].update(family="per-column")), "golden.families"),
    ],
    ids=["rows", "limits", "processors", "family"],
)
def test_faults_of_families_are_named(alter: Alter, name: str, bundle: Bundle, tmp_path: Path) -> None:
    assert name in failed(gate(altered(bundle, tmp_path, alter)))


def with_outliers(directory: Path) -> Path:
    """The tiny model with a factor of 256 in the norms' first group of channels, undone in the linears behind them.

    The function is the same, and so are the int4 codes. A scale per block sees no difference, and a scale per row
    is 256 times as coarse for all other channels.
    """
    copy = directory / "outliers"
    shutil.copytree(TINY, copy)
    tensors = load_file(copy / "model.safetensors")
    readers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for layer in range(4):
        for norm, linears in readers.items():
            tensors[f"model.layers.{layer}.{norm}.weight"][:32] *= 256
            for linear in linears:
                tensors[f"model.layers.{layer}.{linear}.weight"][:, :32] /= 256
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.slow
def test_a_model_that_is_good_here_and_bad_on_arm_fails_by_name(tmp_path: Path) -> None:
    checkpoint = with_outliers(tmp_path)
    report = gate(exported(tmp_path / "outliers.edgellama", checkpoint=checkpoint), checkpoint, max_kl=0.1)
    faults = failed(report)
    assert "quality.kl_per_row" in faults and "quality.kl" not in faults
    assert report.quality["kl_mean"] < 0.05
    assert report.quality["families"]["per-row"]["kl_mean"] > 0.3


@pytest.mark.slow
def test_int8_weights_need_no_second_score(tmp_path: Path) -> None:
    report = gate(exported(tmp_path / "int8.edgellama", RECIPES["int8"]))
    checks = {c.name: c for c in report.checks}
    assert report.passed and "quality.kl_per_row" not in checks
    assert "not rounded at all" in checks["quality.families"].detail
    assert "families" not in report.quality


@pytest.mark.slow
def test_one_rounding_everywhere_is_an_option(tmp_path: Path) -> None:
    recipe = replace(INT4, name="one-rounding", onnx_rounding="per-block")
    bundle = exported(tmp_path / "one.edgellama", recipe)
    assert bundle.manifest["recipe"]["onnx_rounding"] == "per-block"
    config = json.loads((bundle.path / "onnx/genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["mlas.disable_kleidiai"] == "1"
    assert read_golden(bundle).family_of("onnx", "arm64-dotprod") == "per-block"
    report = gate(bundle)
    assert report.passed, report.to_text()
    assert "quality.kl_per_row" not in {c.name for c in report.checks}
