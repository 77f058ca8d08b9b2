"""Verb `export`: checkpoint -> bundle, validated before it appears under its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgellama import __version__
from edgellama.agreement import with_agreement
from edgellama.bundle import Bundle, check_destination, write_manifest
from edgellama.chat import ChatTemplate, derive_format
from edgellama.checkpoint import Checkpoint, open_checkpoint
from edgellama.errors import CheckFailed, Inconclusive, TokenizerError, UsageError
from edgellama.export import pipeline
from edgellama.export.layer_store import LayerStore
from edgellama.export.quantize import TensorRow, planned_bytes
from edgellama.llama import Llama
from edgellama.plan import Frontier, check_budget, make_frontier
from edgellama.progress import Progress
from edgellama.publish import Claim, claimed
from edgellama.recipe import Recipe, find_recipe
from edgellama.record_golden import record_golden
from edgellama.report import Report, to_json
from edgellama.restore import FLOATS, code_hashes, save_floats
from edgellama.score import Limits
from edgellama.targets import find_target
from edgellama.text import Text
from edgellama.validate import check_tokens, tool_versions, validate

DEFAULT_RECIPE = "int4"
DEFAULT_TARGETS = ("xnnpack",)
SHORT_TOKENS = 1024  # scored by the validation that ends an export; `edgellama validate` scores more


def export(
    checkpoint: Checkpoint | str | Path,
    output: str | Path,
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    recipe: Recipe | str = DEFAULT_RECIPE,
    context: int | None = None,
    calibration: Sequence[Text] | None = None,
    max_bytes: int | None = None,
    max_kl: float | None = None,
    validate: bool = True,
    validation_tokens: int = SHORT_TOKENS,
    force: bool = False,
    progress: Progress | None = None,
    on_reports: Callable[[Bundle, Sequence[Report]], None] | None = None,
) -> Bundle:
    """Write the checkpoint as a bundle at `output`, and return it.

    Args:
        targets: names of targets (`edgellama targets`).
        recipe: a recipe, its name, or the path of a recipe file.
        context: length of the KV cache in tokens; None for the model's own, at most 2048.
        calibration: texts that a calibrated recipe reads; None for those that ship with edgellama.
        max_bytes: limit for each artifact, in bytes; predicted before the slow part, measured after it.
        max_kl: limit for the mean KL, nats per token; None for the recipe's own.
        validate: end with a run of the gate over `validation_tokens`; a bundle that fails it does not appear.
        force: replace an existing bundle.
        on_reports: called with the gate's reports, and the bundle where it lies until then, whatever the verdict.

    Raises InputError before the slow part for anything that cannot work, CheckFailed when the result is not good
    enough. In every such case `output` is left as it was.
    """
    progress = progress or Progress()
    destination = Path(output)
    check_destination(destination, force=force)
    if validate:
        check_tokens(validation_tokens)
        Limits(max_kl)
    elif max_kl is not None:
        raise UsageError(
            "a KL limit was given, and validation was turned off", remedy="Leave out one of the two."
        )
    with claimed(destination, force=force) as claim:
        return _export(
            claim,
            checkpoint,
            targets=targets,
            recipe=recipe,
            context=context,
            calibration=calibration,
            max_bytes=max_bytes,
            max_kl=max_kl,
            validation_tokens=validation_tokens if validate else None,
            progress=progress,
            on_reports=on_reports,
        )


def _export(
    claim: Claim,
    checkpoint: Checkpoint | str | Path,
    *,
    targets: Sequence[str],
    recipe: Recipe | str,
    context: int | None,
    calibration: Sequence[Text] | None,
    max_bytes: int | None,
    max_kl: float | None,
    validation_tokens: int | None,
    progress: Progress,
    on_reports: Callable[[Bundle, Sequence[Report]], None] | None,
) -> Bundle:
    destination = claim.destination
    rows = [find_target(name) for name in dict.fromkeys(targets)]
    if not rows:
        raise UsageError("no target to export to", remedy="Give at least one target with -t.")
    chosen = recipe if isinstance(recipe, Recipe) else find_recipe(recipe)
    with progress.stage("open"):
        opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    for note in opened.notes:
        progress.say(f"note: {note}")
    plan = pipeline.make_plan(opened, chosen, rows, context, calibration)
    base_store = LayerStore()
    if chosen.algorithm == "mixed":
        check_budget(plan, max_bytes, max_kl)
        found, base_store = _frontier(plan, progress)
        chosen = found.choose(max_bytes, max_kl)
        plan = replace(plan, recipe=chosen)
    store = LayerStore.of(opened, chosen, plan.calibration) if plan.calibration else LayerStore()
    for row in rows:
        planned = planned_bytes(opened.config, chosen, row.storage, plan.context_length)
        _check_bytes(f"predicted {row.name} artifact", planned, max_bytes)
    with claim.staged() as directory:
        head = _manifest(destination, plan)
        entries, tensors, model = pipeline.run(plan, directory, head, progress=progress, store=store)
        for entry in entries:
            _check_bytes(f"{entry['target']} artifact", entry["bytes"], max_bytes)
        _write_files(directory, plan, tensors, model)
        manifest = {**head, "artifacts": entries}
        bundle = write_manifest(directory, manifest)
        accuracy = {}
        if validation_tokens is not None:
            validated = _validated(bundle, plan, model, validation_tokens, max_kl, progress)
            if on_reports is not None:
                on_reports(bundle, validated)
            _check_verdicts(validated)
            reports = {r.target: r for r in validated}
            for name, report in reports.items():
                (directory / "reports" / f"validate-{name}.json").write_text(
                    report.to_json(), encoding="utf-8"
                )
            accuracy = {name: _headline(report) for name, report in reports.items()}
        with progress.stage("golden"):
            record_golden(bundle, opened, model)
        write_manifest(directory, {**manifest, "accuracy": accuracy})
    base_store.clear()
    store.clear()
    return Bundle.open(destination)


def plan(
    checkpoint: Checkpoint | str | Path,
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    context: int | None = None,
    calibration: Sequence[Text] | None = None,
    progress: Progress | None = None,
) -> Frontier:
    """What recipe `auto` can choose between, by bytes and expected KL; nothing is exported."""
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    rows = [find_target(name) for name in dict.fromkeys(targets)]
    made = pipeline.make_plan(opened, find_recipe("auto"), rows, context, calibration)
    found, _ = _frontier(made, progress or Progress())
    return found


def _frontier(plan: pipeline.Plan, progress: Progress) -> tuple[Frontier, LayerStore]:
    assert plan.calibration is not None
    store = LayerStore.of(plan.checkpoint, plan.recipe, plan.calibration)
    found = make_frontier(
        plan.checkpoint,
        plan.recipe,
        plan.targets,
        plan.context_length,
        plan.calibration,
        store=store,
        progress=progress,
    )
    return found, store


def _validated(
    bundle: Bundle, plan: pipeline.Plan, model: Llama, tokens: int, max_kl: float | None, progress: Progress
) -> list[Report]:
    """The gate's reports about all targets."""
    reports = [
        validate(
            bundle,
            reference=plan.checkpoint,
            target=t.name,
            tokens=tokens,
            max_kl=max_kl,
            quantized=model,
            progress=progress,
        )
        for t in plan.targets
    ]
    reports = with_agreement(bundle, reports, None, progress)
    for report in reports:
        progress.say(report.to_text())
    return reports


def _check_verdicts(reports: Sequence[Report]) -> None:
    """Raises CheckFailed or Inconclusive unless all pass."""
    for report in reports:
        if report.verdict == "pass":
            continue
        bad = [c for c in report.checks if c.verdict == report.verdict]
        kind = Inconclusive if report.verdict == "inconclusive" else CheckFailed
        raise kind(
            f"the {report.target} artifact did not pass: "
            + "; ".join(f"{c.name} is {c.value}, limit {c.limit} {c.detail}".strip() for c in bad),
            remedy="Nothing was written. Use a recipe with more bits or a looser --max-kl; with --no-validate the "
            "bundle is written for a closer look by `edgellama validate`.",
        )


def _headline(report: Report) -> dict[str, Any]:
    keys = (
        "kl_mean",
        "kl_mean_ci95",
        "top1_agreement",
        "top1_agreement_ci95",
        "ppl_reference",
        "ppl_artifact",
    )
    return {"verdict": report.verdict, "tokens": report.tokens, **{k: report.quality[k] for k in keys}}


def _write_files(directory: Path, plan: pipeline.Plan, tensors: Sequence[TensorRow], model: Llama) -> None:
    checkpoint = plan.checkpoint
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir()
    for name, content in checkpoint.tokenizer.files.items():
        (tokenizer / name).write_bytes(content)
    reports = directory / "reports"
    reports.mkdir()
    table: dict[str, Any] = {
        "schema": "edgellama.export/1",
        "tensors": [row.to_dict() for row in tensors],
        "notes": list(checkpoint.notes),
    }
    if plan.calibration is not None:
        table["calibration"] = plan.calibration.to_dict()
        table["codes"] = code_hashes(model)
        save_floats(model, reports / FLOATS)
    (reports / "export.json").write_text(to_json(table), encoding="utf-8")


def _manifest(destination: Path, plan: pipeline.Plan) -> dict[str, Any]:
    """The manifest as far as it is known before anything is lowered."""
    checkpoint = plan.checkpoint
    return {
        "name": destination.name.removesuffix(".edgellama"),
        "tools": {"edgellama": __version__, **tool_versions(plan.targets)},
        "source": {
            "format": checkpoint.format,
            "architecture": "llama",
            "parameters": checkpoint.config.parameters,
            "sha256": checkpoint.sha256(),
            "license": checkpoint.license,
        },
        "model": {**checkpoint.config.to_dict(), "context_length": plan.context_length},
        "chat": _chat(checkpoint),
        "recipe": plan.recipe.to_dict(),
        "artifacts": [],
        "accuracy": {},
    }


def _chat(checkpoint: Checkpoint) -> dict[str, Any]:
    """The chat template's file and its flat format for phones, or null with the reason."""
    tokenizer = checkpoint.tokenizer
    if tokenizer.chat_template is None:
        return {"template": None, "format": None, "reason": "the checkpoint has no chat template"}
    try:
        template = ChatTemplate(
            tokenizer.chat_template, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
        )
        chat_format, reason = derive_format(template)
    except TokenizerError as error:
        chat_format, reason = None, error.message
    return {
        "template": "tokenizer/chat_template.jinja",
        "format": chat_format.to_dict() if chat_format else None,
        "reason": None if chat_format else reason,
    }


def _check_bytes(what: str, found: int, limit: int | None) -> None:
    if limit is not None and found > limit:
        raise CheckFailed(
            f"size: the {what} has {found} bytes, the limit is {limit}",
            remedy="Use a recipe with fewer bits, or a larger --max-bytes. Nothing was written.",
        )
