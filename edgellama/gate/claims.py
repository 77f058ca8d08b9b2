"""Claims: everything that a bundle says about itself and that follows from something else is computed again.

A bundle's limits, ids and figures decide how apps run it and how the gate judges it, so none of them is
taken from the bundle's word. The checks that need a checkpoint are left out without one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST
from edgellama.bundle.golden import FILE as GOLDEN
from edgellama.bundle.record import FILE as BUILD
from edgellama.bundle.record import read_build_record
from edgellama.bundle.reports import EXPORT_REPORT, EXPORT_SCHEMA
from edgellama.bundle.restore import code_hashes
from edgellama.bundle.schema import published, violations
from edgellama.checkpoints import Checkpoint
from edgellama.export.manifest import manifest_sections
from edgellama.export.plan import DEFAULT_CONTEXT, MIN_CONTEXT, Plan
from edgellama.export.quantization.tensors import TensorRow, rows_without_errors
from edgellama.gate.differences import claim, differences, read_canonical
from edgellama.gate.limits import ALWAYS_PASSES, recipe_limit
from edgellama.gate.subject import Section
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import Llama
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import BUDGETED, GIVEN, RECIPES, TARGET_OPTIONS, Recipe, altered_fields
from edgellama.report import Check, below, metrics
from edgellama.report.checks import worst_verdict
from edgellama.targets import Target, find_target
from edgellama.text.calibration import calibrate_on, calibration_texts

SQNR_DB = 0.05  # decibels that another order of sums may change in a tensor's SQNR
NLL = 1e-3  # nats that another processor may change in the full-precision model's mean loss over a window
# Packages of `requires.min_version`. The version is the one that wrote the artifact. A Core ML package itself
# names the least version of the system.
PACKAGES = {"executorch": "executorch", "onnxruntime": "onnxruntime", "llama.cpp": "xllamacpp"}


def shape_of(config: LlamaConfig, context_length: int) -> Llama:
    """A model without weights."""
    with torch.device("meta"):
        return Llama(config, context_length)


def examine_claims(bundle: Bundle, target: Target) -> Section:
    """The claims that need no checkpoint."""
    return Section(
        (
            check_recipe_claim(bundle.recipe),
            check_artifact_entry(bundle, target),
            check_build_record(bundle),
            check_accuracy(bundle, target),
        )
    )


def examine_claims_about(
    bundle: Bundle,
    target: Target,
    checkpoint: Checkpoint,
    quantized: Llama,
    rows: Sequence[TensorRow] | None,
) -> Section:
    """All claims.

    Args:
        bundle: the bundle, its hashes verified.
        target: the examined target.
        checkpoint: the full-precision checkpoint.
        quantized: the quantized model.
        rows: rows of the tensors from quantizing `checkpoint` again; None if that was not done.
    """
    return Section(
        (
            check_manifest(bundle, checkpoint),
            *examine_claims(bundle, target).checks,
            check_tensors(bundle, checkpoint, quantized, rows),
        )
    )


def check_manifest(bundle: Bundle, checkpoint: Checkpoint) -> Check:
    """Check of the manifest's sections `source` and `model` against the checkpoint, and of its bytes."""
    manifest, recipe = bundle.manifest, bundle.recipe
    _, problems = read_canonical(bundle.path / MANIFEST, MANIFEST)
    context = bundle.context_length
    plan = Plan(checkpoint, recipe, tuple(find_target(name) for name in bundle.targets), context)
    expected = manifest_sections(bundle.path, plan)
    for section in ("source", "model"):
        problems += differences(_anywhere(manifest[section]), _anywhere(expected[section]), section)
    longest = checkpoint.config.max_position_embeddings
    if not MIN_CONTEXT <= context <= longest:
        problems.append(f"model.context_length is {context}, the model can have {MIN_CONTEXT} to {longest}")
    problems += [f"tools.{name} is missing" for name in expected["tools"] if name not in manifest["tools"]]
    return claim("claims.manifest", problems)


def _anywhere(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section without `hub`: the same checkpoint may be compared from another place."""
    return {key: value for key, value in section.items() if key != "hub"}


def check_recipe_claim(recipe: Recipe) -> Check:
    """Check that a recipe with the name of one of edgellama's own is that recipe."""
    own = RECIPES.get(recipe.name)
    problems = [
        f"{name} is {getattr(recipe, name)!r:.60}, edgellama's own {recipe.name} has {getattr(own, name)!r:.60}"
        for name in altered_fields(recipe)
    ]
    origin = "edgellama's own" if own is not None else "the bundle's own"
    return claim("claims.recipe", problems, detail=f"{origin} recipe {recipe.name}")


def check_artifact_entry(bundle: Bundle, target: Target) -> Check:
    """Check that the manifest's entry about the artifact is what the file itself says."""
    entry = bundle.artifact_entry(target.name)
    model = shape_of(bundle.config, bundle.context_length)
    expected = target.describe(bundle.artifact(target.name), model)
    expected |= {"target": target.name, "path": target.artifact}
    requires = expected["requires"]
    if requires["runtime"] in PACKAGES:
        requires["min_version"] = bundle.manifest["tools"].get(PACKAGES[requires["runtime"]])
    return claim("claims.artifact", differences(entry, expected, "artifact"))


def check_build_record(bundle: Bundle) -> Check:
    """Check of build.json against the manifest. A bundle in the making, without golden vectors, has none."""
    manifest, recipe = bundle.manifest, bundle.recipe
    if BUILD not in manifest["files"]:
        return claim("claims.build", [f"{BUILD} is missing"] if GOLDEN in manifest["files"] else [])
    record = read_build_record(bundle)
    if record is None:
        return claim("claims.build", [f"{BUILD} contradicts its own hash or its schema"])
    inputs = record["inputs"]
    problems = differences(inputs["targets"], bundle.targets, "targets")
    problems += differences(inputs.get("chat_date"), manifest["chat"].get("date"), "chat_date")
    # A bundle of an older version lacks later options, which had the values of their defaults.
    requested = {**{name: getattr(Recipe, name) for name in TARGET_OPTIONS}, **inputs["recipe"]}
    if requested.get("algorithm") == GIVEN:
        requested["rules"] = recipe.to_dict()["rules"]
    if requested.get("algorithm") in BUDGETED:
        chosen = {"algorithm": BUDGETED[requested["algorithm"]], "rules": recipe.to_dict()["rules"]}
        requested = {**requested, **chosen}
    problems += differences(requested, recipe.to_dict(), "recipe")
    longest = bundle.config.max_position_embeddings
    context = min(longest, DEFAULT_CONTEXT) if inputs["context"] is None else inputs["context"]
    problems += differences(context, bundle.context_length, "context")
    for name, version in manifest["tools"].items():
        recorded = (inputs["tools"].get(name) or "").partition("+")[0]
        problems += differences(recorded, version, f"tools.{name}")
    return claim("claims.build", problems)


def check_tensors(
    bundle: Bundle, checkpoint: Checkpoint, quantized: Llama, rows: Sequence[TensorRow] | None
) -> Check:
    """Check of export.json: its table of tensors, its notes, and the record of calibration.

    SQNR is compared for a recipe without calibration. Calibration folds scales into the weights first.
    """
    if EXPORT_REPORT not in bundle.manifest["files"]:
        return claim("claims.tensors", [f"{EXPORT_REPORT} is missing"])
    report, problems = read_canonical(bundle.path / EXPORT_REPORT, EXPORT_REPORT)
    if not isinstance(report, dict):
        return claim("claims.tensors", [f"{EXPORT_REPORT} is no object"])
    recorded = {name: value for name, value in report.items() if name not in ("tensors", "calibration")}
    expected: dict[str, Any] = {"schema": EXPORT_SCHEMA, "notes": list(checkpoint.notes)}
    calibrated = bool(bundle.recipe.calibration_tokens)
    if calibrated:
        expected["codes"] = code_hashes(quantized)
        problems += _calibration_problems(bundle, checkpoint, report.get("calibration"))
    problems += differences(recorded, expected, "export")
    problems += _scheme_problems(bundle.recipe, quantized)
    table = report.get("tensors")
    if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
        return claim("claims.tensors", [*problems, "export.tensors is no table"])
    without_errors = [{k: v for k, v in row.items() if k not in ("sqnr_db", "given")} for row in table]
    wanted = [
        {k: v for k, v in row.to_dict().items() if k != "sqnr_db"} for row in rows_without_errors(quantized)
    ]
    if rows is not None:
        taken = [row.name for row in rows if row.given]
        problems += differences([row.get("name") for row in table if row.get("given")], taken, "export.given")
    problems += differences(without_errors, wanted, "export.tensors")
    problems += _sqnr_problems(table, rows)
    return claim("claims.tensors", problems, value=len(table))


def _scheme_problems(recipe: Recipe, quantized: Llama) -> list[str]:
    """Modules whose scheme is not the recipe's. A restored model takes its modules from the bundle's word."""
    config = quantized.config
    schemes = check_recipe(recipe, module_shapes(config.tensor_shapes(), config.tie_word_embeddings))
    actual = {row.name.removesuffix(".weight"): row.scheme for row in rows_without_errors(quantized)}
    return [
        f"{name} is {actual.get(name)}, the recipe says {wanted}"
        for name, scheme in schemes.items()
        if actual.get(name) != (wanted := "float32" if scheme is None else scheme.describe())
    ]


def _sqnr_problems(table: Sequence[Mapping[str, Any]], rows: Sequence[TensorRow] | None) -> list[str]:
    problems = []
    expected = {row.name: row.to_dict()["sqnr_db"] for row in rows or ()}
    for row in table:
        name, actual = row.get("name"), row.get("sqnr_db")
        if actual is not None and (row.get("scheme") == "float32" or not isinstance(actual, float)):
            problems.append(f"{name}: an SQNR of {actual} with scheme {row.get('scheme')}")
        if name in expected and not _close(actual, expected[name], SQNR_DB):
            problems.append(f"{name}: an SQNR of {actual} dB, expected {expected[name]}")
    return problems


def _close(actual: Any, expected: float | None, tolerance: float) -> bool:
    if actual is None or expected is None:
        return actual is expected
    return isinstance(actual, (int, float)) and abs(actual - expected) <= tolerance


def _calibration_problems(bundle: Bundle, checkpoint: Checkpoint, recorded: Any) -> list[str]:
    """Differences of the recorded calibration. Of the user's own texts only names and hashes are known.

    A bundle in the making has no build.json yet, so its texts are unknown. `check_build_record` asks for the file.
    """
    if not isinstance(recorded, dict):
        return ["export.calibration is missing"]
    record = read_build_record(bundle)
    if record is None:
        return []
    own = record["inputs"]["calibration"]
    if own is None:
        tokens, length = bundle.recipe.calibration_tokens, bundle.context_length
        shipped = calibrate_on(calibration_texts(), checkpoint.tokenizer, tokens, length).to_dict()
        return differences(recorded, shipped, "export.calibration")
    rows = recorded.get("texts")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return ["export.calibration.texts is no table"]
    named = [{key: value for key, value in row.items() if key != "fingerprints"} for row in rows]
    texts = [{"name": name, "sha256": sha256} for name, sha256 in own]
    return differences(named, texts, "export.calibration.texts")


def check_accuracy(bundle: Bundle, target: Target) -> Check:
    """Check that the manifest's accuracy repeats the stored report, and that the report agrees with itself."""
    name = f"reports/validate-{target.name}.json"
    headline = bundle.manifest["accuracy"].get(target.name)
    if name not in bundle.manifest["files"]:
        problems = [] if headline is None else [f"accuracy.{target.name} has no report"]
        return claim("claims.accuracy", problems, detail="" if problems else "exported without the gate")
    report, problems = read_canonical(bundle.path / name, name)
    schema = published("report")
    wrong = list(violations(report, schema, schema, "report"))
    if wrong:
        return claim("claims.accuracy", [*problems, *wrong])
    problems += _report_problems(bundle, target, report)
    if headline is None:
        problems.append(f"accuracy.{target.name} is missing, and there is a report")
    else:
        quality = {key: report["quality"].get(key) for key in metrics.HEADLINE}
        if bundle.config.is_classifier:
            quality = {key: value for key, value in quality.items() if key in report["quality"]}
        expected = {"verdict": report.get("verdict"), "tokens": report.get("tokens"), **quality}
        problems += differences(headline, expected, f"accuracy.{target.name}")
    return claim("claims.accuracy", problems)


def _report_problems(bundle: Bundle, target: Target, report: Mapping[str, Any]) -> list[str]:
    """Contradictions of a stored report: its subject, its means, its limits and its verdicts."""
    source, manifest = bundle.manifest["source"], bundle.manifest
    sha256 = bundle.artifact_sha256(target.name)
    reference = report["reference"] or {}
    problems = differences(report["target"], target.name, "report.target")
    problems += differences(report.get("artifact_sha256", sha256), sha256, "report.artifact_sha256")
    for key in ("sha256", "format", "parameters"):
        problems += differences(reference.get(key), source[key], f"report.reference.{key}")
    for package, version in report["tools"].items():
        if package in manifest["tools"]:
            problems += differences(version, manifest["tools"][package], f"report.tools.{package}")
    checks = report.get("checks", [])
    worst = worst_verdict(c["verdict"] for c in checks)
    problems += differences(report.get("verdict"), worst, "report.verdict")
    if worst != "pass":
        problems.append(f"report.verdict is {worst}, and no export keeps such a bundle")
    windows = report.get("scored", {}).get("windows", [])
    if not windows:
        return [*problems, "report.scored has no windows"]
    problems += differences(report.get("tokens"), sum(w["tokens"] for w in windows), "report.tokens")
    if any(("nll_reference" in w and "nll_artifact" in w) is bundle.config.is_classifier for w in windows):
        return [*problems, "report.scored has windows without the losses that they should have, or with more"]
    for key, mean in _means(windows).items():
        actual = report["quality"].get(key)
        if actual is None or not math.isclose(actual, mean, rel_tol=1e-6, abs_tol=1e-9):
            problems.append(f"report.quality.{key} is {actual}, its windows give {mean:.6g}")
    return [*problems, *_limit_problems(bundle, report["quality"], checks)]


def _means(windows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Finite figures of the section `quality` that follow from the rows of the windows."""
    weights = np.array([w["tokens"] for w in windows], dtype=np.float64)

    def mean(key: str) -> float:
        values = np.array([math.nan if w[key] is None else w[key] for w in windows])
        return float((values * weights).sum() / weights.sum())

    figures = {"kl_mean": mean("kl"), "top1_agreement": mean("top1")}
    if "nll_reference" in windows[0]:  # not of a classifier
        figures["ppl_reference"] = metrics.perplexity(mean("nll_reference"))
        figures["ppl_artifact"] = metrics.perplexity(mean("nll_artifact"))
    return {key: value for key, value in figures.items() if math.isfinite(value)}


def _limit_problems(
    bundle: Bundle, quality: Mapping[str, Any], checks: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The stored verdict on the KL repeats the figures, and its limit is the export's or the recipe's."""
    row = next((c for c in checks if c["name"] == "quality.kl"), None)
    if row is None:
        return ["report.checks has no quality.kl"]
    problems = differences(row.get("value"), quality["kl_mean"], "report.checks.quality.kl.value")
    record = read_build_record(bundle)
    asked = None if record is None else record["inputs"]["max_kl"]
    limit = (
        recipe_limit(bundle.recipe, bundle.manifest["source"]["parameters"])[0] if asked is None else asked
    )
    problems += differences(row.get("limit"), limit, "report.checks.quality.kl.limit")
    high = quality["kl_mean_ci95"][1] if "kl_mean_ci95" in quality else None
    if high is not None and high > limit:
        problems.append(f"report.quality.kl_mean_ci95 ends at {high}, beyond the limit of {limit}")
    return problems


def check_scores(
    bundle: Bundle, target: Target, scored: Sequence[Mapping[str, Any]], noise_floor: float
) -> Check | None:
    """Check that the stored report's windows have the figures that were measured now; None without common ones.

    Args:
        bundle: the bundle.
        target: the examined target.
        scored: rows of the windows that were scored now (edgellama.gate.quality).
        noise_floor: of parity, KL in nats. Another processor changes the mean KL by less.
    """
    name = f"reports/validate-{target.name}.json"
    if name not in bundle.manifest["files"]:
        return None
    report, _ = read_canonical(bundle.path / name, name)
    schema = published("report")
    if any(violations(report, schema, schema, "report")):
        return None  # claims.accuracy says so
    stored = {window["sha256"]: window for window in report.get("scored", {}).get("windows", [])}
    pairs = [(stored[now["sha256"]], now) for now in scored if now["sha256"] in stored]
    if not pairs:
        return None
    losses = [
        abs(_number(old.get("nll_reference")) - now["nll_reference"])
        for old, now in pairs
        if "nll_reference" in now
    ]
    change = abs(float(np.mean([_number(old["kl"]) - now["kl"] for old, now in pairs])))
    limit = max(ALWAYS_PASSES, noise_floor)
    if not max(losses, default=0.0) <= NLL:
        return claim(
            "claims.scores", [f"the stored report has another loss of the reference, by {max(losses):.3g}"]
        )
    return below(
        "claims.scores", change, limit, detail=f"mean KL of {len(pairs)} windows of the stored report"
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
