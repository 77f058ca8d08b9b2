"""Verb `validate`: the gate. Structure, parity, consistency and quality of the file on disk, with verdicts.

Artifact and reference run side by side on the same tokens; nothing is dumped. When an interval straddles its limit,
more text is read, twice as much each time, until the answer is clear or the text is used up.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.restore import restored_llama
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.errors import InputError, LoweringError, UsageError
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.quantization.rotation import rotated
from edgellama.gate import attribution, consistency, metrics, parity, regression
from edgellama.gate.bisection import first_bad_layer
from edgellama.gate.quality import Limits, Scores, greedy, quality_checks, score, scored_section
from edgellama.gate.structure import PROBES, _check_tokenizer
from edgellama.host.progress import Progress
from edgellama.host.threads import one_thread
from edgellama.model.llama import Llama
from edgellama.report import Check, Report, check
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.load import load
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.targets import Target, find_target
from edgellama.targets.base import tool_versions
from edgellama.targets.provenance import Provenance
from edgellama.text.windows import WINDOW, Text, default_texts, windows

DEFAULT_TOKENS = 4096


def check_tokens(tokens: int) -> None:
    """Raises UsageError for fewer tokens than a window has."""
    if tokens < WINDOW:
        raise UsageError(
            f"--tokens must be at least {WINDOW}, one window, got {tokens}", remedy="Ask for more tokens."
        )


@one_thread()
def validate(
    bundle: Bundle | str | Path,
    *,
    reference: Checkpoint | str | Path | None = None,
    target: str | None = None,
    texts: Sequence[Text] | None = None,
    tokens: int = DEFAULT_TOKENS,
    max_kl: float | None = None,
    min_top1: float | None = None,
    max_ppl_ratio: float | None = None,
    quantized: Llama | None = None,
    layers: bool = False,
    baseline: str | Path | None = None,
    max_kl_increase: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """The gate's report about one target of a bundle.

    Args:
        reference: the full-precision checkpoint the bundle was made from. Without it only the files and the
            artifact's agreement with itself are checked.
        target: None for the bundle's first.
        texts: what is scored; None for the texts that ship with edgellama.
        tokens: how many tokens are scored at first; more are when an interval straddles a limit.
        max_kl, min_top1, max_ppl_ratio: limits; max_kl None means the recipe's own.
        layers: also measure where the error comes from (edgellama.gate.attribution).
        baseline: an earlier report of the same text, or a bundle that holds one, to compare with window by window.
        max_kl_increase: what the mean KL may grow by over the baseline's, nats per token; None for 5 % of it.
        quantized: the quantized torch model, where the caller has it; None to make it again.

    Raises InputError when the bundle or the reference cannot be used. A failed check is no error: see `passed`.
    """
    progress = progress or Progress()
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    row = find_target(target or bundle.targets[0])
    limits = Limits(max_kl, min_top1, max_ppl_ratio)
    check_tokens(tokens)
    regression.check_limit(max_kl_increase, baseline)
    if reference is None and (layers or baseline is not None or limits != Limits()):
        what = (
            "where the error comes from was asked"
            if layers
            else "a baseline was given"
            if baseline is not None
            else "a quality limit was given"
        )
        raise UsageError(f"{what} without a reference", remedy="Add --reference CHECKPOINT.")
    problems = bundle.problems()
    files = check(
        "structure.files", not problems, value=len(problems), limit=0, detail="; ".join(problems[:3])
    )
    if problems:
        return _report(row, "not run", None, [files])
    if reference is None:
        return _validate_alone(bundle, row, files, progress)
    checkpoint = reference if isinstance(reference, Checkpoint) else open_checkpoint(reference)
    _check_source(bundle, checkpoint)
    texts = texts or default_texts()
    earlier = None
    if baseline is not None:
        earlier = regression.read_baseline(Path(baseline), row.name, checkpoint.sha256())
        length = min(WINDOW, bundle.context_length)
        first = islice(windows(texts, bundle.tokenizer, length), -(-tokens // length))
        regression.check_windows(list(first), earlier)
    if limits.max_kl is None:
        limits = Limits(bundle.recipe.kl_limit(checkpoint.config.parameters), min_top1, max_ppl_ratio)
    report = _validate(bundle, row, checkpoint, texts, tokens, limits, files, quantized, layers, progress)
    return report if earlier is None else regression.with_regression(report, earlier, max_kl_increase)


def _validate(
    bundle: Bundle,
    row: Target,
    checkpoint: Checkpoint,
    texts: Sequence[Text],
    tokens: int,
    limits: Limits,
    files: Check,
    quantized: Llama | None,
    layers: bool,
    progress: Progress,
) -> Report:
    with progress.stage("load for validation"):
        try:
            quantized = quantized or quantized_model(bundle, row, checkpoint)
        except LoweringError as error:
            codes = check("structure.codes", False, detail=error.message)
            return _report(row, "not run", checkpoint, [files, codes])
        full = ReferenceRuntime(load_llama(checkpoint, bundle.context_length))
    structure = row.check_structure(bundle.artifact(row.name), quantized, Provenance.of(bundle.manifest, row))
    checks = [files, *structure, _check_tokenizer(bundle.tokenizer, checkpoint.tokenizer, texts)]
    measured = Scores()
    with load(bundle, row.name) as artifact:
        name = artifact.name
        length = min(WINDOW, artifact.context_length)
        source = windows(texts, bundle.tokenizer, length)
        with progress.stage("score"):
            quality = score(
                source,
                artifact,
                full,
                quantized,
                row.arithmetic_for(bundle.recipe),
                measured,
                -(-tokens // length),
                limits,
                progress,
            )
        section = parity.summarize(measured.parity, measured.floor)
        checks += parity.checks(section, row.parity_kl)
        with progress.stage("consistency"):
            figures, consistent = consistency.measure_consistency(
                artifact,
                measured.samples[0].tokens,
                floor=section["noise_floor_kl"],
                always_passes=row.parity_kl,
            )
            checks += consistent
            agreement, samples = greedy(artifact, full, measured.samples, bundle.tokenizer)
            quality |= agreement
        checks += artifact.checks()
        by_layer = {}
        if layers:
            turned = rotated(checkpoint, bundle.recipe.rotation)
            same = full.model if turned is checkpoint else load_llama(turned, bundle.context_length)
            by_layer = _by_layer(bundle, row, same, quantized, artifact, texts, progress)
    if any(c.name.startswith("parity.") and c.verdict == "fail" for c in checks):
        provenance = Provenance.of(bundle.manifest, row)
        figures["first_bad_layer"] = first_bad_layer(
            quantized, row, provenance, measured.samples[:2], progress
        )
    checks += quality_checks(quality, limits)
    return _report(
        row,
        name,
        checkpoint,
        checks,
        tokens=sum(len(w.kl) for w in measured.quality),
        windows=len(measured.quality),
        parity=section | figures,
        quality=quality,
        domains={n: metrics.summarize(w) for n, w in sorted(measured.domains.items())}
        if len(texts) > 1
        else {},
        layers=by_layer,
        scored=scored_section(measured.windows, measured.quality),
        samples=samples,
    )


def _by_layer(
    bundle: Bundle,
    row: Target,
    full: Llama,
    quantized: Llama,
    artifact: Runtime,
    texts: Sequence[Text],
    progress: Progress,
) -> dict[str, Any]:
    length = min(attribution.TOKENS, bundle.context_length)
    taken = list(islice(windows(texts, bundle.tokenizer, length), attribution.WINDOWS))
    with progress.stage("layers"):
        return attribution.attribute_error(
            full,
            quantized,
            bundle.recipe,
            taken,
            rounding=row.rounding(bundle.recipe),
            artifact=artifact,
            progress=progress,
        )


def quantized_model(bundle: Bundle, row: Target, checkpoint: Checkpoint) -> Llama:
    """The quantized torch model of a bundle: quantized again, or restored where that needs calibration.

    Raises LoweringError when the artifact does not hold the codes that were chosen.
    """
    if bundle.recipe.calibration_tokens:
        return restored_llama(bundle, row)
    return quantized_llama(checkpoint, bundle.recipe, bundle.context_length)[0]


def _validate_alone(bundle: Bundle, row: Target, files: Check, progress: Progress) -> Report:
    """Without a reference: the files, and the artifact's agreement with itself."""
    text = " ".join(PROBES) * 4
    with load(bundle, row.name) as artifact, progress.stage("consistency"):
        tokens = bundle.tokenizer.encode(text)
        figures, checks = consistency.measure_consistency(
            artifact, tokens, floor=row.assumed_floor, always_passes=row.parity_kl
        )
        return _report(row, artifact.name, None, [files, *checks, *artifact.checks()], parity=figures)


def _check_source(bundle: Bundle, checkpoint: Checkpoint) -> None:
    recorded, found = bundle.manifest["source"]["sha256"], checkpoint.sha256()
    if recorded != found:
        raise InputError(
            f"{checkpoint.path} is not the checkpoint that {bundle.path} was made from "
            f"(sha256 {found[:12]}…, the manifest says {str(recorded)[:12]}…)",
            remedy="Give the checkpoint that was exported.",
        )


def _report(
    row: Target, runtime: str, checkpoint: Checkpoint | None, checks: list[Check], **sections: Any
) -> Report:
    reference = None
    if checkpoint is not None:
        reference = {
            "format": checkpoint.format,
            "parameters": checkpoint.config.parameters,
            "sha256": checkpoint.sha256(),
            "notes": list(checkpoint.notes),
        }
    structure = {
        c.name.removeprefix("structure."): c.verdict for c in checks if c.name.startswith("structure.")
    }
    return Report(
        target=row.name,
        runtime=runtime,
        reference=reference,
        tokens=sections.get("tokens", 0),
        windows=sections.get("windows", 0),
        structure=structure,
        parity=sections.get("parity", {}),
        quality=sections.get("quality", {}),
        domains=sections.get("domains", {}),
        layers=sections.get("layers", {}),
        scored=sections.get("scored", {}),
        samples=tuple(sections.get("samples", ())),
        checks=tuple(checks),
        tools=tool_versions([row]),
    )
