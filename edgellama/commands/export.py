"""Verb `export`: checkpoint to bundle, validated before it appears under its name.

Light, so that a bundle that is up to date costs no import of torch: the phases are in `export_phases`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.bundle import Bundle
from edgellama.bundle.publish import claimed
from edgellama.bundle.record import (
    DEFAULT_RECIPE,
    DEFAULT_TARGETS,
    SHORT_TOKENS,
    ExportRequest,
    stale_reasons,
)
from edgellama.errors import UsageError
from edgellama.gate.limits import Limits, check_tokens
from edgellama.host.progress import Progress
from edgellama.recipe import Recipe, find_recipe
from edgellama.report import Report
from edgellama.targets import find_target
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
    force: bool = False,
    progress: Progress | None = None,
    on_reports: Callable[[Bundle, Sequence[Report]], None] | None = None,
) -> Bundle:
    """Write the checkpoint as a bundle at `output`, and return it.

    Args:
        checkpoint: an open checkpoint, or the path of one.
        output: the bundle's directory.
        targets: names of targets (`edgellama targets`).
        recipe: a recipe, its name, or the path of a recipe file.
        context: length of the KV cache in tokens; None for the model's own, at most 2048.
        calibration: texts for a calibrated recipe; None for those that ship with edgellama.
        max_bytes: limit for each artifact, in bytes; predicted before the slow part, measured after it.
        max_kl: limit for the mean KL, nats per token; None for the recipe's own.
        validate: whether to end with a run of the gate. A bundle that fails it does not appear.
        validation_tokens: number of tokens that this run scores.
        force: replace an existing bundle.
        progress: reporter of stages; None for a silent one. A bundle that was up to date has no stages.
        on_reports: called with the gate's reports and the staged bundle, whatever the verdict.

    A bundle at `output` that already is the result is left alone and returned. Of one that is replaced, parts that would
    come out the same are reused (`edgellama.bundle.reuse`).

    Raises InputError before the slow part for anything that cannot work, CheckFailed when the result is not good
    enough. In every such case `output` is left as it was.

    Example::

        bundle = edgellama.export("path/to/model", "model.edgellama", targets=["xnnpack", "onnx"], recipe="int4")
        print(bundle.manifest["accuracy"]["xnnpack"]["kl_mean"])
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
    path = checkpoint if isinstance(checkpoint, (str, Path)) else checkpoint.path
    in_memory = not isinstance(checkpoint, (str, Path)) and not checkpoint.as_opened
    stale = stale_reasons(destination, path, request)
    if stale == [] and not in_memory:
        progress.say(f"{destination} is up to date")
        return Bundle.open(destination)
    if stale and not force:
        raise UsageError(
            f"{destination} exists, and is not what would be made: {', '.join(stale)}",
            remedy="Use --force to replace it, or choose another name with -o.",
        )
    with claimed(destination, force=force) as claim:
        from edgellama.commands.export_phases import run_phases

        run_phases(claim, checkpoint, request, calibration, progress, on_reports)
    return Bundle.open(destination)


def forecast(
    checkpoint: Checkpoint | str | Path,
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    recipe: Recipe | str = DEFAULT_RECIPE,
    context: int | None = None,
    validate: bool = True,
) -> dict[str, Any]:
    """Bytes, memory and time that `export` with these arguments would take, as JSON (schema `edgellama.plan/1`).

    Takes seconds, and reads no weights.
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
    """The choices of a recipe such as `auto`, by bytes and expected KL. Nothing is exported."""
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
    from edgellama.checkpoints import open_checkpoint
    from edgellama.export.plan import make_plan

    opened = open_checkpoint(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
    chosen = recipe if isinstance(recipe, Recipe) else find_recipe(recipe)
    return make_plan(opened, chosen, [find_target(n) for n in dict.fromkeys(targets)], context, calibration)
