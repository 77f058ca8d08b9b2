"""Verb `validate`: the gate. Structure, parity, consistency and quality of the file on disk, with verdicts.

Artifact and reference run side by side on the same tokens, and no logits are stored. If an interval straddles
its limit, the number of windows doubles until the verdict is clear or the text is used up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.bundle import Bundle
from edgellama.bundle.record import read_build_record
from edgellama.bundle.restore import restored_llama
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.errors import InputError, LoweringError, UsageError
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.quantization.rotation import rotated
from edgellama.export.quantization.tensors import TensorRow
from edgellama.gate import attribution, regression
from edgellama.gate.bisection import first_bad_layer
from edgellama.gate.claims import check_scores, examine_claims, examine_claims_about, shape_of
from edgellama.gate.consistency import examine_consistency, examine_end, examine_overflow
from edgellama.gate.cross_check import check_installed, examine_cross_check, first_cross_check
from edgellama.gate.device_form import examine_device_form
from edgellama.gate.effort import effort_for
from edgellama.gate.golden_claims import FLOORS, examine_golden
from edgellama.gate.limits import LONGEST, Limits, check_tokens, recipe_limit
from edgellama.gate.long_window import LongRun, examine_long_window, long_text, run_long
from edgellama.gate.noise import Noise
from edgellama.gate.own_dtype import examine_own_dtype
from edgellama.gate.own_tokenizer import examine_own_tokenizer
from edgellama.gate.parity import examine_parity
from edgellama.gate.part_parity import examine_parts
from edgellama.gate.quality import Scores, examine_quality, score
from edgellama.gate.relowering import examine_relowering
from edgellama.gate.structure import check_files, examine_structure, examine_structure_alone
from edgellama.gate.subject import Section, Subject, report_of
from edgellama.gate.text_checks import examine_texts
from edgellama.gate.weights import examine_weights
from edgellama.host.progress import Progress
from edgellama.host.threads import one_thread
from edgellama.model.llama import Llama
from edgellama.report import Check, Report, check
from edgellama.runtimes.load import load
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.targets import Target, find_target
from edgellama.text.windows import WINDOW, Text, default_texts, windows

DEFAULT_TOKENS = 4096
BISECTED = (
    "parity.kl",
    "parity.kl_first_positions",
)  # failures that show in the positions that a bisection compares


@dataclass(frozen=True)
class _Options:
    """Options of an examination with a reference."""

    texts: Sequence[Text]
    tokens: int
    limits: Limits
    layers: bool
    cross_check: bool | None
    relower: bool


@one_thread()
def validate(
    bundle: Bundle | str | Path,
    *,
    reference: Checkpoint | str | Path | None = None,
    target: str | None = None,
    texts: Sequence[Text] | None = None,
    tokens: int | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    max_ppl_ratio: float | None = None,
    quantized: Llama | None = None,
    layers: bool = False,
    cross_check: bool | None = False,
    baseline: str | Path | None = None,
    max_kl_increase: float | None = None,
    relower: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Runs the gate on one target of a bundle, and returns its report.

    Args:
        bundle: an open bundle, or the path of one.
        reference: the full-precision checkpoint that the bundle was made from. Without it, only the files and
            the artifact's consistency are checked.
        target: name of the target; None for the bundle's first.
        texts: evaluation texts; None for those that ship with edgellama.
        tokens: number of tokens to score first; None for 4,096, or 1,024 if the runtime is slow here. More are
            scored if an interval straddles a limit.
        max_kl: limit for the mean KL, nats per token; None for the recipe's own.
        min_top1: limit for the share of positions whose top token agrees; None for no limit.
        max_ppl_ratio: limit for the perplexity of the artifact over the reference's; None for no limit.
        quantized: the quantized torch model; None to quantize or restore it.
        layers: also attribute the error to layers (edgellama.gate.attribution).
        cross_check: also compare the checkpoint with transformers' reading of it (edgellama.gate.cross_check).
            None for the first time that this checkpoint is examined, if transformers is installed.
        baseline: an earlier report of the same text, or a bundle that holds one, to compare window by window.
        max_kl_increase: largest increase of the mean KL over the baseline's, nats per token; None for 5 %.
        relower: lower the quantized model again, and compare the file with the result. An export leaves it out
            for an artifact that it has just lowered.
        progress: reporter of stages; None for a silent one.

    Raises InputError if the bundle or the reference cannot be used, and MissingDependencyError for a
    cross-check without transformers. A failed check
    raises nothing; see `passed`.

    >>> import edgellama
    >>> report = edgellama.validate(bundle, reference=model, tokens=1024, max_kl=0.5)
    >>> report.passed, report.quality["kl_mean"] < 0.5
    (True, True)
    """
    progress = progress or Progress()
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    chosen_target = find_target(target or bundle.targets[0])
    limits = Limits(max_kl, min_top1, max_ppl_ratio)
    if tokens is None:
        tokens = effort_for(chosen_target).tokens or DEFAULT_TOKENS
    check_tokens(tokens)
    regression.check_limit(max_kl_increase, baseline)
    if reference is None:
        _refuse_without_reference(limits, layers=layers, cross_check=bool(cross_check), baseline=baseline)
    if cross_check:
        check_installed()
    files = check_files(bundle)
    if files.verdict == "fail":
        return report_of(chosen_target, "not run", None, [Section((files,))])
    if reference is None:
        return _about(bundle, _examined_alone(bundle, chosen_target, files, progress))
    checkpoint = reference if isinstance(reference, Checkpoint) else open_checkpoint(reference)
    _check_source(bundle, checkpoint)
    checkpoint = checkpoint.with_stop_tokens(recorded_stop_tokens(bundle))
    texts = texts or default_texts()
    text_checks = examine_texts(bundle, texts)
    options = _Options(
        texts, tokens, _with_recipes_kl(limits, bundle, checkpoint), layers, cross_check, relower
    )
    earlier = (
        None if baseline is None else _read_baseline(baseline, bundle, chosen_target, checkpoint, options)
    )
    report = _examined(bundle, chosen_target, checkpoint, quantized, files, text_checks, options, progress)
    report = _about(bundle, report)
    return report if earlier is None else regression.with_regression(report, earlier, max_kl_increase)


def _about(bundle: Bundle, report: Report) -> Report:
    """The report with the hash of the artifact that it is about."""
    if report.runtime == "not run":
        return report
    return replace(report, artifact_sha256=bundle.artifact_sha256(report.target))


def quantized_model(bundle: Bundle, target: Target, checkpoint: Checkpoint) -> Llama:
    """The quantized torch model of a bundle: quantized again, or restored if the recipe is calibrated.

    Raises LoweringError if the artifact does not hold the calibrated codes.
    """
    return _quantized(bundle, target, checkpoint)[0]


def _quantized(
    bundle: Bundle, target: Target, checkpoint: Checkpoint
) -> tuple[Llama, list[TensorRow] | None]:
    """`quantized_model`, and the rows of its tensors if it was quantized again."""
    if bundle.recipe.calibration_tokens:
        return restored_llama(bundle, target), None
    return quantized_llama(checkpoint, bundle.recipe, bundle.context_length)


def _examined(
    bundle: Bundle,
    target: Target,
    checkpoint: Checkpoint,
    quantized: Llama | None,
    files: Check,
    text_checks: Section,
    options: _Options,
    progress: Progress,
) -> Report:
    """The report of all examinations that need a reference."""
    rows: list[TensorRow] | None = None
    effort = effort_for(target)
    with progress.stage("load for validation"):
        try:
            if quantized is None:
                quantized, rows = _quantized(bundle, target, checkpoint)
        except LoweringError as error:
            codes = check("structure.codes", False, detail=error.message)
            return report_of(target, "not run", checkpoint, [Section((files, codes))])
    # Before the reference is loaded, because lowering needs memory too.
    relowered = examine_relowering(bundle, target, quantized, progress) if options.relower else Section()
    with progress.stage("load for validation"):
        full = ReferenceRuntime(load_llama(checkpoint, bundle.context_length))
    with load(bundle, target.name) as artifact:
        subject = Subject(bundle, target, checkpoint, artifact, full, quantized)
        with progress.stage("structure"):
            sections = [
                Section((files,)),
                examine_structure(subject),
                relowered,
                examine_own_tokenizer(bundle, artifact, options.texts),
                examine_claims_about(bundle, target, checkpoint, quantized, rows),
                text_checks,
            ]
        with progress.stage("weights"):
            sections.append(examine_weights(subject))
        if options.cross_check is not False:
            examine = examine_cross_check if options.cross_check else first_cross_check
            with progress.stage("cross-check"):
                sections.append(examine(checkpoint, full.model))
        with progress.stage("score"):
            count = -(-options.tokens // subject.window_length)
            scores = score(subject, subject.windows(options.texts), count, options.limits, progress)
        parity = examine_parity(scores.parity, scores.floor, target.parity_kl)
        with progress.stage("long window"):
            length = effort.long_length(bundle.context_length)
            run = run_long(artifact, long_text(bundle.tokenizer, options.texts, length))
            kl_mean = float(np.concatenate([w.kl for w in scores.quality]).mean())
            noise = Noise.of([w.kl for w in scores.floor])
            long_window, noise, last_logits = examine_long_window(subject, run, noise=noise, kl_mean=kl_mean)
        with progress.stage("consistency"):
            consistency = examine_consistency(
                artifact, run.tokens, noise=noise, always_passes=target.parity_kl, effort=effort
            )
            quality = examine_quality(subject, scores, options.limits, by_domain=len(options.texts) > 1)
        sections += [parity, long_window, consistency, Section(tuple(artifact.checks()))]
        with progress.stage("golden"):
            figures = parity.fields["parity"] | long_window.fields["parity"]
            floors = [value for key, value in figures.items() if key in FLOORS]
            sections.append(examine_golden(subject, floors, (run.tokens[:LONGEST], last_logits)))
        scored = quality.fields["scored"]["windows"]
        if (stored := check_scores(bundle, target, scored, figures["noise_floor_kl"])) is not None:
            sections.append(Section((stored,)))
        if options.layers:
            sections.append(_examine_layers(subject, options.texts, progress))
        sections.append(quality)
        runtime = artifact.name
    sections.append(_end(bundle, target, run, noise, progress))
    with progress.stage("parity of parts"):
        path = bundle.artifact(target.name)
        sections.append(examine_parts(target, path, quantized, bundle.recipe, run.tokens))
        sections.append(examine_own_dtype(target, path, run.tokens))
        sections.append(examine_device_form(target, path, run.tokens, noise))
    if any(c.name in BISECTED and c.verdict == "fail" for s in sections for c in s.checks):
        sections.append(_first_bad_layer(subject, scores, progress))
    return report_of(target, runtime, checkpoint, sections)


def _examine_layers(subject: Subject, texts: Sequence[Text], progress: Progress) -> Section:
    bundle = subject.bundle
    source = rotated(subject.checkpoint, bundle.recipe.rotation)
    # A rotated model has the logits of its checkpoint, but other hidden states.
    full = subject.full.model if source is subject.checkpoint else load_llama(source, bundle.context_length)
    length = min(attribution.TOKENS, bundle.context_length)
    first_windows = list(islice(windows(texts, bundle.tokenizer, length), attribution.WINDOWS))
    with progress.stage("layers"):
        layers = attribution.attribute_error(
            full,
            subject.quantized,
            bundle.recipe,
            first_windows,
            rounding=subject.target.rounding(bundle.recipe),
            artifact=subject.artifact,
            progress=progress,
        )
    return Section(fields={"layers": layers})


def _first_bad_layer(subject: Subject, scores: Scores, progress: Progress) -> Section:
    provenance = subject.target.provenance(subject.bundle.manifest)
    layer = first_bad_layer(subject.quantized, subject.target, provenance, scores.samples[:2], progress)
    return Section(fields={"parity": {"first_bad_layer": layer}})


def _examined_alone(bundle: Bundle, target: Target, files: Check, progress: Progress) -> Report:
    """The report without a reference: the files, and the artifact's consistency."""
    effort = effort_for(target)
    length = effort.long_length(bundle.context_length)
    tokens = long_text(bundle.tokenizer, default_texts(), length)
    noise = Noise.assumed(target.assumed_floor)
    with load(bundle, target.name) as artifact, progress.stage("consistency"):
        run = run_long(artifact, tokens)
        consistency = examine_consistency(
            artifact, tokens, noise=noise, always_passes=target.parity_kl, effort=effort
        )
        sections = [
            Section((files,)),
            examine_structure_alone(bundle, target, shape_of(bundle.config, bundle.context_length)),
            examine_claims(bundle, target),
            examine_own_tokenizer(bundle, artifact, default_texts()),
            consistency,
            Section(tuple(artifact.checks())),
        ]
        runtime = artifact.name
    sections.append(_end(bundle, target, run, noise, progress))
    return report_of(target, runtime, None, sections)


def _end(bundle: Bundle, target: Target, run: LongRun, noise: Noise, progress: Progress) -> Section:
    """Checks of the end of the context, on the artifact loaded anew."""
    with progress.stage("end of the context"), load(bundle, target.name) as artifact:
        if not effort_for(target).ends:
            return Section((examine_overflow(artifact),))
        return examine_end(artifact, run, noise=noise, always_passes=target.parity_kl)


def _refuse_without_reference(limits: Limits, *, layers: bool, cross_check: bool, baseline: object) -> None:
    if not layers and not cross_check and baseline is None and limits == Limits():
        return
    request = (
        "a cross-check was requested"
        if cross_check
        else "the attribution to layers was requested"
        if layers
        else "a baseline was given"
        if baseline is not None
        else "a quality limit was given"
    )
    raise UsageError(f"{request} without a reference", remedy="Add --reference CHECKPOINT.")


def _check_source(bundle: Bundle, checkpoint: Checkpoint) -> None:
    source = bundle.manifest["source"]
    recorded, actual = source["sha256"], checkpoint.sha256()
    count, given = len(source.get("adapters", ())), len(checkpoint.adapters)
    if recorded != actual and source.get("base_sha256", recorded) == checkpoint.base_sha256():
        raise InputError(
            f"{bundle.path} was made from {checkpoint.path} with {count} adapters, and the reference has "
            f"{given}{'' if count != given else ', others or in another order'}",
            remedy="Give the adapters of the export with --adapter, in their order and with their weights.",
        )
    if recorded != actual:
        raise InputError(
            f"{checkpoint.path} is not the checkpoint that {bundle.path} was made from "
            f"(sha256 {actual[:12]}…, the manifest says {str(recorded)[:12]}…)",
            remedy="Give the checkpoint that was exported.",
        )
    recorded, actual = bundle.manifest["source"].get("config_sha256"), checkpoint.config_sha256()
    if recorded not in (None, actual):  # None: a bundle of an older version
        raise InputError(
            f"{checkpoint.path} has the weights that {bundle.path} was made from, and another config",
            remedy="Give the checkpoint that was exported, with its own config.json.",
        )


def recorded_stop_tokens(bundle: Bundle) -> list[str]:
    """Texts of `export --stop-token` that a bundle's build.json records."""
    record = read_build_record(bundle)
    return [] if record is None else list(record["inputs"].get("stop_tokens") or ())


def _with_recipes_kl(limits: Limits, bundle: Bundle, checkpoint: Checkpoint) -> Limits:
    if limits.max_kl is not None:
        return limits
    max_kl, source = recipe_limit(bundle.recipe, checkpoint.config.parameters)
    return replace(limits, max_kl=max_kl, kl_source=source)


def _read_baseline(
    baseline: str | Path, bundle: Bundle, target: Target, checkpoint: Checkpoint, options: _Options
) -> Mapping[str, Any]:
    """Reads the earlier report, and checks its first windows against the windows to be scored."""
    earlier = regression.read_baseline(Path(baseline), target.name, checkpoint.sha256())
    length = min(WINDOW, bundle.context_length)
    first = islice(windows(options.texts, bundle.tokenizer, length), -(-options.tokens // length))
    regression.check_windows(list(first), earlier)
    return earlier
