"""Verb `export`: checkpoint to bundle, validated before it appears under its name.

This module does not import torch, so an export of a bundle that is up to date is quick. The phases are in
`export_phases`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.bundle import Bundle
from edgellama.bundle.publish import check_destination, claimed
from edgellama.bundle.record import (
    DEFAULT_RECIPE,
    DEFAULT_TARGETS,
    SHORT_TOKENS,
    ExportRequest,
    other_options,
    read_build_record,
    stale_reasons,
)
from edgellama.bundle.vouchers import objection
from edgellama.commands.classify_task import ClassifyTask, check_task
from edgellama.errors import UsageError
from edgellama.gate.limits import Limits, check_tokens
from edgellama.host.adapter_files import adapter_places, swappable_places
from edgellama.host.find_checkpoint import find_checkpoint
from edgellama.host.progress import Progress
from edgellama.recipe import Recipe, find_recipe
from edgellama.report import Report
from edgellama.targets import TARGETS, find_target
from edgellama.text.windows import Text

if TYPE_CHECKING:
    from edgellama.checkpoints import Checkpoint
    from edgellama.export.plan import Plan
    from edgellama.export.quantization.sensitivity import Frontier


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
    stop_tokens: Sequence[str] | None = None,
    date: str | None = None,
    adapters: Sequence[str | Path] = (),
    swappable_adapters: Mapping[str, str | Path] | Sequence[str] = (),
    task: ClassifyTask | None = None,
    force: bool = False,
    download: bool = False,
    progress: Progress | None = None,
    on_reports: Callable[[Bundle, Sequence[Report]], None] | None = None,
) -> Bundle:
    """Exports the checkpoint as a bundle at `output`, and returns the bundle.

    Args:
        checkpoint: an open checkpoint, the path of one, or OWNER/NAME of a model in the Hugging Face cache.
        output: the bundle's directory.
        targets: names of targets (`edgellama targets`).
        recipe: a recipe, its name, or the path of a recipe file.
        context: length of the KV cache in tokens; None for the model's own, at most 2048.
        calibration: texts for a calibrated recipe; None for those that ship with edgellama.
        max_bytes: limit for each artifact, in bytes. Predicted before the slow part, measured after it.
        max_kl: limit for the mean KL, nats per token; None for the recipe's own.
        validate: run the gate at the end. A bundle that fails does not appear.
        validation_tokens: number of tokens that the gate scores.
        stop_tokens: texts of tokens that end an answer, besides those that the checkpoint names. An empty list
            accepts a chat model without any.
        date: ISO date for a chat template that writes one; None for the template's own.
        adapters: directories of LoRA adapters that are merged into the checkpoint, as paths or DIR:WEIGHT.
        swappable_adapters: directories of LoRA adapters by name, or texts NAME=DIR. They lie beside the base and are
            switched at run time, for targets whose runtimes can.
        task: labels and prompt of a classifier; None for a model that generates text.
        force: replace an existing bundle.
        download: fetch from the hub what the Hugging Face cache lacks. Without it, no connection is opened.
        progress: reporter of stages; None for a silent one. There are no stages if the bundle is up to date.
        on_reports: called with the staged bundle and the gate's reports, for any verdict.

    A bundle at `output` that is up to date is returned unchanged. Unchanged parts of
    a bundle that is replaced are reused (`edgellama.bundle.reuse`). Both hold only for bundles that this machine
    has a voucher for (`edgellama.bundle.vouchers`). Without it the export is repeated, and without `force` it
    must give the same bytes.

    Raises InputError before the slow part for anything that cannot work, CheckFailed if the result is not
    good enough. After an error, `output` is unchanged.

    >>> import edgellama
    >>> bundle = edgellama.export(model, "two.edgellama", targets=["xnnpack", "coreml"], recipe="int4-fast")
    >>> bundle.targets
    ['xnnpack', 'coreml']
    >>> bundle.manifest["accuracy"]["xnnpack"]["verdict"]
    'pass'
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
    places, swappable = adapter_places(adapters), swappable_places(swappable_adapters)
    _check_swappable(swappable, targets, merged=bool(places))
    request = ExportRequest.of(
        recipe=recipe,
        targets=targets,
        context=context,
        calibration=calibration,
        max_bytes=max_bytes,
        max_kl=max_kl,
        validation_tokens=validation_tokens if validate else None,
        stop_tokens=stop_tokens,
        chat_date=date,
        adapters=places,
        swappable=swappable,
        classifier=None if task is None else task.to_dict(),
    )
    if task is not None:
        check_task(task, targets, request.recipe, swappable=swappable, gate=validate)
    # A destination that is not free is refused before a checkpoint is looked for, and perhaps downloaded.
    differences = other_options(destination, request)
    if differences is None:
        check_destination(destination, force=force)
    _refuse_difference(destination, differences, force=force)
    if isinstance(checkpoint, (str, Path)):
        checkpoint = find_checkpoint(checkpoint, download=download, say=progress.say)
    path = checkpoint if isinstance(checkpoint, Path) else checkpoint.path
    in_memory = not isinstance(checkpoint, (str, Path)) and not checkpoint.as_opened
    stale = stale_reasons(destination, path, request)
    old: Bundle | None = None
    if stale == [] and not in_memory:
        old = Bundle.open(destination)
        record = read_build_record(old)
        reason = "its record cannot be read" if record is None else objection(old, record["key"])
        if reason is None:
            progress.say(f"{destination} is up to date")
            return old
        progress.say(f"{destination} records the requested inputs, but {reason}; the export is repeated")
    _refuse_difference(destination, stale, force=force)
    compared_with = None if force else old
    with claimed(destination, force=force or old is not None) as claim:
        from edgellama.commands.export_phases import run_phases

        if places:
            from edgellama.checkpoints.adapters import with_adapters

            checkpoint = with_adapters(_opened(checkpoint), places)
        run_phases(
            claim,
            checkpoint,
            request,
            calibration,
            progress,
            on_reports,
            swappable=swappable,
            task=task,
            compared_with=compared_with,
        )
    if compared_with is not None:
        progress.say(f"{destination} was up to date: the repeated export gave the same bytes")
    return Bundle.open(destination)


def _check_swappable(swappable: Mapping[str, Path], targets: Sequence[str], *, merged: bool) -> None:
    """Raises UsageError for a target whose runtime cannot switch adapters, and for merged adapters besides."""
    unable = [n for n in dict.fromkeys(targets) if find_target(n).adapter_ending is None]
    if swappable and unable:
        able = ", ".join(t.name for t in TARGETS.values() if t.adapter_ending is not None)
        raise UsageError(
            f"target {unable[0]!r} cannot switch adapters at run time",
            remedy=f"Use targets that can ({able}), or merge one adapter for each bundle: --adapter DIR.",
        )
    if swappable and merged:
        raise UsageError(
            "--adapter merges an adapter into the base, and --adapters switches others beside it; a bundle has one kind",
            remedy="Leave out one of the two.",
        )


def _refuse_difference(destination: Path, reasons: Sequence[str] | None, *, force: bool) -> None:
    """Raises UsageError if the bundle at `destination` differs from the requested one, unless `force`."""
    if reasons and not force:
        raise UsageError(
            f"{destination} exists and differs from the requested bundle: {', '.join(reasons)}",
            remedy="Use --force to replace it, or choose another name with -o.",
        )


def forecast(
    checkpoint: Checkpoint | str | Path,
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    recipe: Recipe | str = DEFAULT_RECIPE,
    context: int | None = None,
    validate: bool = True,
) -> dict[str, Any]:
    """Expected bytes, memory and time of an export, as JSON data (schema `edgellama.plan/1`).

    The arguments are those of `export`. It takes seconds and reads no weights.
    """
    from edgellama.export.forecast import describe

    return describe(_plan(checkpoint, targets, recipe, context, None), validate=validate)


def frontier(
    checkpoint: Checkpoint | str | Path,
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    recipe: Recipe | str = "auto",
    context: int | None = None,
    calibration: Sequence[Text] | None = None,
    progress: Progress | None = None,
) -> Frontier:
    """Choices of a budgeted recipe such as `auto`, by bytes and expected KL. Exports nothing.

    Args:
        checkpoint: an open checkpoint, or the path of one.
        targets: names of targets.
        recipe: a budgeted recipe, its name, or the path of a recipe file.
        context: length of the KV cache in tokens; None for the model's own, at most 2048.
        calibration: calibration texts; None for those that ship with edgellama.
        progress: reporter of stages; None for a silent one.
    """
    from edgellama.commands.export_phases import measured_frontier

    plan = _plan(checkpoint, targets, recipe, context, calibration)
    return measured_frontier(plan, progress or Progress())[0]


def _plan(
    checkpoint: Checkpoint | str | Path,
    targets: Sequence[str],
    recipe: Recipe | str,
    context: int | None,
    calibration: Sequence[Text] | None,
) -> Plan:
    from edgellama.export.plan import make_plan

    opened = _opened(checkpoint)
    chosen = recipe if isinstance(recipe, Recipe) else find_recipe(recipe)
    return make_plan(opened, chosen, [find_target(n) for n in dict.fromkeys(targets)], context, calibration)


def _opened(checkpoint: Checkpoint | str | Path) -> Checkpoint:
    from edgellama.checkpoints import open_checkpoint

    return open_checkpoint(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
