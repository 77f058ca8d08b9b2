"""Phases of the gate: the examinations of one artifact in their order, and its report.

The order keeps memory low: the quantized model is lowered again before the reference is loaded. The artifact is
loaded when the references have read their texts, and closed before it is loaded anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from edgellama.bundle import Bundle
from edgellama.bundle.restore import restored_llama
from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.adapters.swappable import Swappable
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.errors import LoweringError
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.quantization.rotation import rotated
from edgellama.export.quantization.tensors import TensorRow
from edgellama.gate import attribution, parity
from edgellama.gate.adapters import examine_adapter_files, examine_adapters
from edgellama.gate.bisection import first_bad_layer
from edgellama.gate.claims import check_scores, examine_claims, examine_claims_about, shape_of
from edgellama.gate.consistency import examine_consistency, examine_end, examine_overflow
from edgellama.gate.cross_check import examine_cross_check, first_cross_check
from edgellama.gate.device_form import examine_device_form
from edgellama.gate.effort import effort_for
from edgellama.gate.golden import golden_sequences
from edgellama.gate.golden_claims import FLOORS, examine_golden
from edgellama.gate.golden_families import examine_families
from edgellama.gate.label_checks import check_calibration, examine_labels, prompts
from edgellama.gate.labelled import LabelLimits, examine_labelled
from edgellama.gate.limits import LONGEST, Limits
from edgellama.gate.long_window import LongRun, examine_long_window, long_text, run_long
from edgellama.gate.noise import Noise
from edgellama.gate.own_dtype import examine_own_dtype
from edgellama.gate.own_tokenizer import examine_own_tokenizer
from edgellama.gate.parity import examine_parity
from edgellama.gate.part_parity import examine_parts
from edgellama.gate.prefix_checks import check_prefix
from edgellama.gate.quality import Scores, examine_quality, score
from edgellama.gate.quality_families import scored_families
from edgellama.gate.references import References
from edgellama.gate.relowering import examine_relowering
from edgellama.gate.structure import examine_structure, examine_structure_alone
from edgellama.gate.subject import Section, Subject, Unloaded, report_of
from edgellama.gate.weights import examine_weights
from edgellama.host.memory import return_freed_memory
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.report import Check, Report, check
from edgellama.runtimes.load import load
from edgellama.targets import Target
from edgellama.text.labelled import LabelledTexts
from edgellama.text.windows import Text, Window, default_texts, in_turn, windows

# Failures that show in the positions that a bisection compares.
BISECTED = ("parity.kl", "parity.kl_first_positions")


@dataclass(frozen=True)
class Options:
    """Options of an examination with a reference."""

    texts: Sequence[Text]
    tokens: int
    limits: Limits
    layers: bool
    cross_check: bool | None
    relower: bool
    swappables: tuple[Swappable, ...] = ()
    labelled: LabelledTexts | None = None
    label_limits: LabelLimits = field(default_factory=LabelLimits)
    tune: LabelledTexts | None = None


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


def examined(
    bundle: Bundle,
    target: Target,
    references: References,
    files: Check,
    text_checks: Section,
    options: Options,
    progress: Progress,
) -> Report:
    """The report of all examinations that need a reference."""
    rows: list[TensorRow] | None = None
    effort, full, quantized = effort_for(target), references.full, references.quantized
    checkpoint = full.checkpoint
    with progress.stage("load for validation"):
        try:
            if quantized is None:
                quantized, rows = _quantized(bundle, target, checkpoint)
        except LoweringError as error:
            codes = check("structure.codes", False, detail=error.message)
            return report_of(target, "not run", checkpoint, [Section((files, codes))])
    relowered = examine_relowering(bundle, target, quantized, progress) if options.relower else Section()
    expected = references.of_target(quantized, bundle.recipe, target)
    unloaded = Unloaded(bundle, target, checkpoint, full, quantized, expected)
    texts, count = unloaded.windows(options.texts), -(-options.tokens // unloaded.window_length)
    tokens = long_text(bundle.tokenizer, options.texts, effort.long_length(bundle.context_length))
    with progress.stage("references"):
        _read_ahead(unloaded, list(islice(in_turn(texts), count)), tokens, progress)
    with progress.stage("structure"):
        structure = examine_structure(unloaded)
        claims = examine_claims_about(bundle, target, checkpoint, quantized, rows)
    with progress.stage("weights"):
        weights = examine_weights(unloaded)
    cross_check = Section()
    if options.cross_check is not False:
        examine = examine_cross_check if options.cross_check else first_cross_check
        with progress.stage("cross-check"):
            cross_check = examine(checkpoint, full, bundle.context_length)
    return_freed_memory()
    with load(bundle, target.name) as artifact:
        subject = Subject.of(unloaded, artifact)
        own_tokenizer = examine_own_tokenizer(bundle, artifact, options.texts)
        sections = [Section((files,)), structure, relowered, own_tokenizer, claims, text_checks, weights]
        sections.append(cross_check)
        with progress.stage("score"):
            scores = score(subject, texts, count, options.limits, progress, scored_families(subject))
        parity_section = examine_parity(scores.parity, scores.floor, target.parity_kl)
        with progress.stage("long window"):
            run = run_long(artifact, tokens)
            kl_mean = float(np.concatenate([w.kl for w in scores.quality]).mean())
            noise = Noise.of([w.kl for w in scores.floor])
            long_window, noise = examine_long_window(subject, run, noise=noise, kl_mean=kl_mean)
        with progress.stage("consistency"):
            consistency = examine_consistency(
                artifact, run.tokens, noise=noise, always_passes=target.parity_kl, effort=effort
            )
            quality = examine_quality(subject, scores, options.limits, by_domain=len(options.texts) > 1)
        sections += [parity_section, long_window, consistency, Section(tuple(artifact.checks()))]
        with progress.stage("labels") if bundle.classifier else nullcontext():
            sections.append(examine_labels(subject, noise, options.tune, progress))
            if options.labelled is not None:
                sections.append(examine_labelled(subject, options.labelled, options.label_limits, progress))
        with progress.stage("golden"):
            figures = parity_section.fields["parity"] | long_window.fields["parity"]
            floors = [value for key, value in figures.items() if key in FLOORS]
            sections.append(examine_golden(subject, floors))
            sections.append(examine_families(subject, floors))
        scored = quality.fields["scored"]["windows"]
        if (stored := check_scores(bundle, target, scored, figures["noise_floor_kl"])) is not None:
            sections.append(Section((stored,)))
        if options.layers:
            sections.append(_examine_layers(subject, options.texts, progress))
        sections.append(quality)
        sections.append(
            examine_adapters(
                subject, options.swappables, options.texts, options.tokens, options.limits, progress
            )
        )
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


def _read_ahead(
    subject: Unloaded, windows: Sequence[Window], long_tokens: Sequence[int], progress: Progress
) -> None:
    """Computes all texts of the gate that are known before it begins, each reference in one pass."""
    longest = long_tokens[:LONGEST]
    golden = [s.tokens for s in golden_sequences(subject.bundle, subject.bundle.tokenizer)]
    subject.full.read_ahead([*(w.tokens for w in windows), longest, *golden], progress)
    compared = [w.tokens[: parity.TOKENS] for w in windows[: parity.WINDOWS]]
    subject.expected.read_ahead([*compared, longest, *golden], progress, noisy=True)


def _examine_layers(subject: Subject, texts: Sequence[Text], progress: Progress) -> Section:
    bundle = subject.bundle
    source = rotated(subject.checkpoint, bundle.recipe.rotation)
    # A rotated model has the logits of its checkpoint, but other hidden states.
    full = subject.full if source is subject.checkpoint else StreamedLlama(source)
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


def examined_alone(
    bundle: Bundle, target: Target, files: Check, progress: Progress, tune: LabelledTexts | None = None
) -> Report:
    """The report without a reference: the files, the artifact's consistency, and its calibration if `tune` is given."""
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
            examine_adapter_files(bundle, target),
            examine_own_tokenizer(bundle, artifact, default_texts()),
            consistency,
            Section(tuple(artifact.checks())),
            Section(
                (
                    *check_calibration(bundle, target, artifact, tune, progress),
                    *check_prefix(bundle, target, artifact, prompts(bundle), noise, progress),
                )
                if bundle.classifier
                else ()
            ),
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
