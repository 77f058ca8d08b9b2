"""Verb `export`: checkpoint -> bundle, validated before it appears under its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import write_manifest
from edgellama.bundle.publish import Claim, claimed
from edgellama.bundle.record import (
    DEFAULT_RECIPE,
    DEFAULT_TARGETS,
    SHORT_TOKENS,
    ExportRequest,
    checkpoint_files,
    stale_reasons,
)
from edgellama.bundle.restore import FLOATS
from edgellama.bundle.reuse import PartKeys, Reuse, write_record
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.commands.validate import check_tokens, validate
from edgellama.errors import CheckFailed, Inconclusive, UsageError
from edgellama.export import pipeline
from edgellama.export.forecast import check_resources, describe
from edgellama.export.manifest import _headline, _manifest, _write_files
from edgellama.export.plan import Plan, make_plan
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.sensitivity import Frontier, base_recipe, check_budget, measure_frontier
from edgellama.gate.agreement import with_agreement
from edgellama.gate.golden import record_golden
from edgellama.gate.quality import Limits
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.recipe import BUDGETED, Recipe, find_recipe
from edgellama.report import Report
from edgellama.targets import find_target
from edgellama.targets.sizes import planned_bytes
from edgellama.text.windows import Text


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

    A bundle at `output` that is already what would be made is left alone and returned. Of one that is replaced, parts
    that would come out the same are kept (`edgellama.bundle.reuse`).

    Raises InputError before the slow part for anything that cannot work, CheckFailed when the result is not good
    enough. In every such case `output` is left as it was.
    """
    progress = progress or Progress()
    destination = Path(output)
    if not targets:
        raise UsageError("no target to export to", remedy="Give at least one target with -t.")
    if validate:
        check_tokens(validation_tokens)
        Limits(max_kl)
    elif max_kl is not None:
        raise UsageError(
            "a KL limit was given, and validation was turned off", remedy="Leave out one of the two."
        )
    request = ExportRequest.of(
        recipe=recipe,
        targets=targets,
        context=context,
        calibration=calibration,
        max_bytes=max_bytes,
        max_kl=max_kl,
        validation_tokens=validation_tokens if validate else None,
    )
    where = checkpoint.path if isinstance(checkpoint, Checkpoint) else Path(checkpoint)
    changed = stale_reasons(destination, where, request)
    if changed == [] and not (isinstance(checkpoint, Checkpoint) and not checkpoint.as_opened):
        progress.say(f"{destination} is up to date")
        return Bundle.open(destination)
    if changed and not force:
        raise UsageError(
            f"{destination} exists, and is not what would be made: {', '.join(changed)}",
            remedy="Use --force to replace it, or choose another name with -o.",
        )
    with claimed(destination, force=force) as claim:
        return _export(claim, checkpoint, request, calibration, progress, on_reports)


def _export(
    claim: Claim,
    checkpoint: Checkpoint | str | Path,
    request: ExportRequest,
    calibration: Sequence[Text] | None,
    progress: Progress,
    on_reports: Callable[[Bundle, Sequence[Report]], None] | None,
) -> Bundle:
    destination, chosen, context = claim.destination, request.recipe, request.context
    max_bytes, max_kl, validation_tokens = request.max_bytes, request.max_kl, request.validation_tokens
    rows = [find_target(name) for name in request.targets]
    with progress.stage("open"):
        opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    for note in opened.notes:
        progress.say(f"note: {note}")
    plan = make_plan(opened, chosen, rows, context, calibration)
    base_store = LayerStore()
    if chosen.algorithm in BUDGETED:
        check_budget(plan, max_bytes, max_kl)
        frontier, base_store = _frontier(plan, progress)
        chosen = frontier.choose(max_bytes, max_kl)
        plan = replace(plan, recipe=chosen)
    store = LayerStore.of(opened, chosen, plan.calibration) if plan.calibration else LayerStore()
    for row in rows:
        planned = planned_bytes(plan.config, chosen, row.storage, plan.context_length)
        _check_bytes(f"predicted {row.name} artifact", planned, max_bytes)
    check_resources(plan, destination, validate=validation_tokens is not None)
    files = checkpoint_files(opened.path) if opened.as_opened else None
    keys = None if files is None else _keys(request, files, plan)
    kept = Reuse.of(destination, keys)
    with claim.staged() as directory:
        head = _manifest(destination, plan)
        found = {row.name: entry for row in rows if (entry := kept.artifact(row, directory))}
        reports_kept = {name: report for name in found if (report := kept.report(name))}
        found_before = tuple(found)
        if found:
            progress.say(f"kept of the old bundle: {', '.join(found)}")
        to_lower = replace(plan, targets=tuple(row for row in rows if row.name not in found))
        to_validate = [row for row in rows if validation_tokens and row.name not in reports_kept]
        before, model = kept.golden(), None
        if to_lower.targets or to_validate or before is None or not _keep_files(directory, kept):
            entries, tensors, model = pipeline.run(to_lower, directory, head, progress=progress, store=store)
            _write_files(directory, plan, tensors, model)
            found |= {entry["target"]: entry for entry in entries}
        entries = [found[row.name] for row in rows]
        for entry in entries:
            _check_bytes(f"{entry['target']} artifact", entry["bytes"], max_bytes)
        write_record(directory, request, files, keys)
        manifest = {**head, "artifacts": entries}
        bundle = write_manifest(directory, manifest)
        accuracy = {}
        if validation_tokens is not None:
            validated = _validated(
                bundle, plan, model, validation_tokens, max_kl, progress, kept, reports_kept
            )
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
            record_golden(bundle, opened, model, before=before, kept=found_before)
        write_manifest(directory, {**manifest, "accuracy": accuracy})
    base_store.trim()
    store.trim()
    return Bundle.open(destination)


def forecast(
    checkpoint: Checkpoint | str | Path,
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    recipe: Recipe | str = DEFAULT_RECIPE,
    context: int | None = None,
    validate: bool = True,
) -> dict[str, Any]:
    """What `export` with these arguments would make and take, in seconds and without reading weights; JSON."""
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    rows = [find_target(name) for name in dict.fromkeys(targets)]
    chosen = recipe if isinstance(recipe, Recipe) else find_recipe(recipe)
    return describe(make_plan(opened, chosen, rows, context), validate=validate)


def frontier(
    checkpoint: Checkpoint | str | Path,
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    recipe: Recipe | str = "auto",
    context: int | None = None,
    calibration: Sequence[Text] | None = None,
    progress: Progress | None = None,
) -> Frontier:
    """What a recipe such as `auto` can choose between, by bytes and expected KL; nothing is exported."""
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    rows = [find_target(name) for name in dict.fromkeys(targets)]
    chosen = recipe if isinstance(recipe, Recipe) else find_recipe(recipe)
    made = make_plan(opened, chosen, rows, context, calibration)
    found, _ = _frontier(made, progress or Progress())
    return found


def _frontier(plan: Plan, progress: Progress) -> tuple[Frontier, LayerStore]:
    assert plan.calibration is not None
    store = LayerStore.of(plan.checkpoint, base_recipe(plan.recipe), plan.calibration)
    found = measure_frontier(
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
    bundle: Bundle,
    plan: Plan,
    model: Llama | None,
    tokens: int,
    max_kl: float | None,
    progress: Progress,
    kept: Reuse,
    reports_kept: Mapping[str, Report],
) -> list[Report]:
    """The gate's reports about all targets. reports_kept: those that need not be made again, by target."""
    reports = [
        reports_kept.get(t.name)
        or validate(
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
    reports = with_agreement(bundle, reports, None, progress, kept.agreement(bundle.targets))
    for report in reports:
        if report.target in reports_kept:
            progress.say(f"{report.target}: the gate's report is kept, verdict: {report.verdict}")
        else:
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


def _keys(request: ExportRequest, files: Mapping[str, str], plan: Plan) -> PartKeys:
    calibration = None if plan.calibration is None else plan.calibration.to_dict()
    return PartKeys.of(request, files, plan.recipe, plan.targets, plan.context_length, calibration)


def _keep_files(directory: Path, kept: Reuse) -> bool:
    """Take what `_write_files` writes from the old bundle; False where it has to be written."""
    if not kept.model or not kept.take("tokenizer", directory):
        return False
    wanted = ["reports/export.json"]
    if kept.bundle is not None and f"reports/{FLOATS}" in kept.bundle.manifest["files"]:
        wanted.append(f"reports/{FLOATS}")
    return all(kept.take(path, directory) for path in wanted)


def _check_bytes(what: str, found: int, limit: int | None) -> None:
    if limit is not None and found > limit:
        raise CheckFailed(
            f"size: the {what} has {found} bytes, the limit is {limit}",
            remedy="Use a recipe with fewer bits, or a larger --max-bytes. Nothing was written.",
        )
