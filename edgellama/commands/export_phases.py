"""Phases of an export. Each returns a value that the next phase takes.

Order: decide (plan, budget, sizes, memory), reuse parts of the old bundle, lower the missing artifacts, write
the bundle, run the gate, record golden vectors. `decide` raises before the slow phases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, write_manifest
from edgellama.bundle.publish import Claim
from edgellama.bundle.record import SHORT_TOKENS, ExportRequest, checkpoint_files
from edgellama.bundle.reuse import PartKeys, Reuse, ReusedParts, write_record
from edgellama.bundle.vouchers import vouch
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.adapters.swappable import open_swappables
from edgellama.commands.classifier_parts import calibrations, prefix_files
from edgellama.commands.classify_task import ClassifyTask, check_lengths, check_prefix_task, for_task
from edgellama.commands.validate import validate
from edgellama.errors import CheckFailed, CheckpointError, Inconclusive
from edgellama.export import pipeline
from edgellama.export.forecast import check_resources
from edgellama.export.lower import lowering_for
from edgellama.export.manifest import manifest_sections, write_licenses, write_model_files
from edgellama.export.plan import Plan, make_plan
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.given import given_note
from edgellama.export.quantization.sensitivity import Frontier, base_recipe, check_budget, measure_frontier
from edgellama.files import file_sha256
from edgellama.gate.agreement import with_agreement
from edgellama.gate.effort import effort_for
from edgellama.gate.golden import record_golden
from edgellama.gate.references import References
from edgellama.host.progress import Progress
from edgellama.host.torch_defaults import check_torch_defaults
from edgellama.model.llama import Llama
from edgellama.recipe import BUDGETED, GIVEN
from edgellama.report import Report
from edgellama.runtimes.load import opener_for
from edgellama.targets import Target, find_target
from edgellama.targets.sizes import planned_bytes
from edgellama.text.windows import Text

OnReports = Callable[[Bundle, Sequence[Report]], None]


@dataclass(frozen=True)
class Decision:
    """Decisions that are made before the slow phases.

    Attributes:
        plan: the plan, with the schemes that a budgeted recipe chose.
        files: sha256 of the checkpoint's files, by name; None for a checkpoint that exists only in memory.
        keys: content keys of the bundle's parts; None for a checkpoint that exists only in memory.
        stores: caches of calibrated layers. They are trimmed when the bundle is written.
    """

    plan: Plan
    files: Mapping[str, str] | None
    keys: PartKeys | None
    stores: tuple[LayerStore, ...]


@dataclass(frozen=True)
class Lowered:
    """Result of lowering.

    Attributes:
        entries: the manifest's artifact entries, in the order of the plan's targets.
        model: the quantized model; None if every part was reused.
    """

    entries: tuple[Mapping[str, Any], ...]
    model: Llama | None


def run_phases(
    claim: Claim,
    checkpoint: Checkpoint | str | Path,
    request: ExportRequest,
    calibration: Sequence[Text] | None,
    progress: Progress,
    on_reports: OnReports | None,
    *,
    swappable: Mapping[str, Path] = MappingProxyType({}),
    task: ClassifyTask | None = None,
    compared_with: Bundle | None = None,
) -> None:
    """Writes the requested bundle to the claimed destination.

    Args:
        claim: the destination, locked for this process.
        checkpoint: an open checkpoint, or the path of one.
        request: the options as the user gave them.
        calibration: texts for a calibrated recipe; None for those that ship with edgellama.
        progress: reporter of stages.
        on_reports: called with the staged bundle and the gate's reports, for any verdict.
        swappable: directories of adapters that are switched at run time, by name.
        task: labels and prompt of a classifier; None for a model that generates text.
        compared_with: a bundle at the destination that says it is the requested one. CheckFailed is raised,
            and it stays in place, unless the new one has the same bytes. None for no such condition.
    """
    check_torch_defaults()
    decision = decide(checkpoint, request, calibration, claim.destination, progress, swappable, task)
    plan = decision.plan
    # Adapters lie in files of their own, and labelled texts are no key of a part, so nothing old covers them.
    apart = plan.swappable or task is not None
    reuse = Reuse(None) if apart else Reuse.of(claim.destination, decision.keys)
    layers = plan.config.num_hidden_layers
    with claim.staged() as directory, decision.stores[-1].named_on_interrupt(layers, progress):
        sections = manifest_sections(claim.destination, plan, request.chat_date)
        write_licenses(directory, plan.checkpoint)
        parts = reuse.copy_into(directory, plan.targets, gate=request.validation_tokens is not None)
        if parts.artifacts:
            progress.say(f"kept of the old bundle: {', '.join(parts.artifacts)}")
        elif reuse.objection is not None and compared_with is None:
            progress.say(f"nothing of the old bundle is kept: {reuse.objection}")
        lowered = lower_missing(decision, parts, directory, sections, progress)
        for entry in lowered.entries:
            _check_bytes(f"{entry['target']} artifact", entry["bytes"], request.max_bytes)
        sections = {**sections, "artifacts": list(lowered.entries)}
        bundle = write_manifest(directory, sections)
        if task is not None and (found := calibrations(bundle, task, progress)):
            sections = {**sections, "classifier": {**sections["classifier"], "calibration": found}}
            bundle = write_manifest(directory, sections, hashed=bundle)
        if task is not None and (shipped := prefix_files(bundle, task, progress)):
            sections = {**sections, "classifier": {**sections["classifier"], "prefix_files": shipped}}
            bundle = write_manifest(directory, sections, hashed=bundle)
        accuracy = {}
        references = References.of(plan.checkpoint, lowered.model)
        if request.validation_tokens is not None:
            reports = run_gate(bundle, decision, references, request, parts, progress, task)
            if on_reports is not None:
                on_reports(bundle, reports)
            _check_verdicts(reports)
            accuracy = _write_reports(directory, reports)
        with progress.stage("golden"):
            record_golden(bundle, references, before=parts.golden, kept=tuple(parts.artifacts))
        bundle = write_manifest(directory, {**sections, "accuracy": accuracy}, hashed=bundle)
        key = write_record(bundle, request, decision.files, decision.keys)
        bundle = write_manifest(directory, {**sections, "accuracy": accuracy}, hashed=bundle)
        if compared_with is not None:
            _check_same(compared_with, bundle)
    if decision.keys is not None:
        vouch(Bundle.open(claim.destination), key)
    for store in decision.stores:
        store.trim()


def decide(
    checkpoint: Checkpoint | str | Path,
    request: ExportRequest,
    calibration: Sequence[Text] | None,
    destination: Path,
    progress: Progress,
    swappable: Mapping[str, Path] = MappingProxyType({}),
    task: ClassifyTask | None = None,
) -> Decision:
    """Makes the plan and checks it against the model, the budget, the memory and the disk.

    Raises InputError or CheckFailed. Only a budgeted recipe takes long, because its sensitivities
    are measured.
    """
    with progress.stage("open"):
        opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
        opened = for_task(opened.with_stop_tokens(request.stop_tokens or ()), task)
    for note in opened.notes:
        progress.say(f"note: {note}")
    if request.stop_tokens is None and task is None:
        _check_stops(opened)
    targets = [find_target(name) for name in request.targets]
    _check_installed(targets, gate=request.validation_tokens is not None)
    plan = make_plan(opened, request.recipe, targets, request.context, calibration)
    if task is not None:
        check_prefix_task(opened, task, request.targets)
        check_lengths(opened, task, plan.context_length)
    if plan.recipe.algorithm == GIVEN:
        progress.say(f"note: {given_note(opened, plan.recipe)}")
    plan = replace(plan, swappable=open_swappables(opened, swappable))
    for note in (f"{s.name}: {note}" for s in plan.swappable for note in s.notes(opened)):
        progress.say(f"note: {note}")
    stores: tuple[LayerStore, ...] = ()
    if plan.recipe.algorithm in BUDGETED:
        check_budget(plan, request.max_bytes, request.max_kl)
        frontier, base_store = measured_frontier(plan, progress)
        plan = replace(plan, recipe=frontier.choose(request.max_bytes, request.max_kl))
        stores = (base_store,)
    store = LayerStore.of(opened, plan.recipe, plan.calibration) if plan.calibration else LayerStore()
    for target in targets:
        planned = planned_bytes(plan.config, plan.recipe, target.storage, plan.context_length)
        _check_bytes(f"predicted {target.name} artifact", planned, request.max_bytes)
    check_resources(plan, destination, validate=request.validation_tokens is not None)
    files = checkpoint_files(opened.path) if opened.as_opened else None
    keys = None if files is None else _keys(request, files, plan)
    return Decision(plan, files, keys, (*stores, store))


def _check_installed(targets: Sequence[Target], *, gate: bool) -> None:
    """Raises MissingDependencyError if a target's extra is missing, before hours of calibration."""
    for target in targets:
        if target.extra is not None:
            lowering_for(target)
            if gate:
                opener_for(target)


def _check_stops(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a chat model whose answers nothing ends."""
    if checkpoint.tokenizer.chat_template is not None and not checkpoint.config.eos_token_ids:
        raise CheckpointError(
            f"{checkpoint.path}: the model has a chat template, and neither its config nor its tokenizer nor the "
            "template names a token that ends an answer",
            remedy="Name one with --stop-token TEXT, or accept answers without an end with --stop-token none.",
        )


def measured_frontier(plan: Plan, progress: Progress) -> tuple[Frontier, LayerStore]:
    """Choices of a budgeted recipe, and the cache of the calibrated layers that they were measured with."""
    assert plan.calibration is not None
    store = LayerStore.of(plan.checkpoint, base_recipe(plan.recipe), plan.calibration)
    with store.named_on_interrupt(plan.config.num_hidden_layers, progress):
        frontier = measure_frontier(
            plan.checkpoint,
            plan.recipe,
            plan.targets,
            plan.context_length,
            plan.calibration,
            store=store,
            progress=progress,
        )
    return frontier, store


def lower_missing(
    decision: Decision,
    parts: ReusedParts,
    directory: Path,
    sections: Mapping[str, Any],
    progress: Progress,
) -> Lowered:
    """Quantizes the model and lowers it for the targets that were not reused.

    Does neither if the old bundle has every part.
    """
    plan, model, entries = decision.plan, None, dict(parts.artifacts)
    if not parts.complete:
        missing = replace(plan, targets=tuple(t for t in plan.targets if t.name not in parts.artifacts))
        new_entries, tensors, model = pipeline.run(
            missing, directory, sections, progress=progress, store=decision.stores[-1]
        )
        write_model_files(directory, plan, tensors, model)
        entries |= {entry["target"]: entry for entry in new_entries}
    return Lowered(tuple(entries[target.name] for target in plan.targets), model)


def run_gate(
    bundle: Bundle,
    decision: Decision,
    references: References,
    request: ExportRequest,
    parts: ReusedParts,
    progress: Progress,
    task: ClassifyTask | None = None,
) -> list[Report]:
    """Runs the gate on every target without a reused report, and returns the reports of all targets.

    Args:
        bundle: the staged bundle.
        decision: the plan.
        references: the models in memory.
        request: the options as the user gave them. `validation_tokens` is not None.
        parts: parts of the old bundle, with their reports.
        progress: reporter of stages.
        task: labelled texts of a classifier, and their limits.
    """
    assert request.validation_tokens is not None
    reports = [
        parts.reports.get(target.name)
        or validate(
            bundle,
            reference=decision.plan.checkpoint,
            target=target.name,
            tokens=_tokens(request.validation_tokens, target),
            max_kl=request.max_kl,
            references=references,
            swappable_adapters={s.name: s.path for s in decision.plan.swappable},
            cross_check=None if target is decision.plan.targets[0] else False,
            relower=target.name in parts.artifacts,
            labelled=None if task is None else task.data,
            label_limits=None if task is None else task.limits,
            tune=None if task is None else task.tune,
            progress=progress,
        )
        for target in decision.plan.targets
    ]
    reports = with_agreement(bundle, reports, None, progress, parts.agreement)
    for report in reports:
        if report.target in parts.reports:
            progress.say(f"{report.target}: the gate's report is kept, verdict: {report.verdict}")
        else:
            progress.say(report.to_text())
    return reports


def _tokens(asked: int, target: Target) -> int:
    """Number of tokens to score first: fewer than the default if the runtime is slow here."""
    return (effort_for(target).tokens or asked) if asked == SHORT_TOKENS else asked


def _check_same(old: Bundle, new: Bundle) -> None:
    """Raises CheckFailed unless both bundles have the same manifest, which holds the hashes of all files."""
    hashes = [{n: e["sha256"] for n, e in bundle.manifest["files"].items()} for bundle in (old, new)]
    differing = sorted(n for n in {*hashes[0], *hashes[1]} if hashes[0].get(n) != hashes[1].get(n))
    # Reports and record repeat the hashes of the others.
    differing = [n for n in differing if not n.startswith("reports/")] or differing
    if file_sha256(old.path / MANIFEST) != file_sha256(new.path / MANIFEST):
        names = ", ".join(differing[:3] or [MANIFEST]) + (" and others" if len(differing) > 3 else "")
        raise CheckFailed(
            f"{old.path} says that it was made from these inputs, but this export makes other content of: {names}",
            remedy="It was altered, or made on a processor that rounds differently. Use --force to replace it, or "
            "`edgellama validate` to judge it as it is.",
        )


def _check_verdicts(reports: Sequence[Report]) -> None:
    """Raises CheckFailed or Inconclusive unless all reports pass."""
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


def _reproducible(report: Report) -> Report:
    """The report without what depends on earlier exports of this machine, so that equal inputs give equal bytes.

    The cross-check is made once for a checkpoint, and only a kept artifact is lowered again. Both have passed.
    """
    checks = (c for c in report.checks if not c.name.startswith(("cross_check.", "structure.relowered")))
    structure = {name: verdict for name, verdict in report.structure.items() if name != "relowered"}
    return replace(report, checks=tuple(checks), structure=structure, cross_check={})


def _write_reports(directory: Path, reports: Sequence[Report]) -> dict[str, Any]:
    """Writes the reports and returns the manifest's section `accuracy`, by target."""
    for report in map(_reproducible, reports):
        path = directory / "reports" / f"validate-{report.target}.json"
        path.write_text(report.to_json(), encoding="utf-8")
    return {report.target: report.headline() for report in reports}


def _keys(request: ExportRequest, files: Mapping[str, str], plan: Plan) -> PartKeys:
    calibration = None if plan.calibration is None else plan.calibration.to_dict()
    return PartKeys.of(request, files, plan.recipe, plan.targets, plan.context_length, calibration)


def _check_bytes(subject: str, actual: int, limit: int | None) -> None:
    if limit is not None and actual > limit:
        raise CheckFailed(
            f"size: the {subject} has {actual} bytes, the limit is {limit}",
            remedy="Use a recipe with fewer bits, or a larger --max-bytes. Nothing was written.",
        )
