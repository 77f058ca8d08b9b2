"""Verb `validate`: the gate. Structure, parity, consistency and quality of the file on disk, with verdicts.

Artifact and reference run side by side on the same tokens, and no logits are stored. If an interval straddles
its limit, the number of windows doubles until the verdict is clear or the text is used up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.record import read_build_record
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.recorded_labels import as_recorded
from edgellama.commands.validate_original import examined_original, is_original
from edgellama.commands.validate_phases import Options, examined, examined_alone
from edgellama.errors import InputError, UsageError
from edgellama.gate import regression
from edgellama.gate.adapters import given_adapters
from edgellama.gate.cross_check import check_installed
from edgellama.gate.effort import effort_for
from edgellama.gate.label_checks import refuse_other_texts
from edgellama.gate.labelled import LabelLimits, token_ids
from edgellama.gate.limits import Limits, check_tokens, recipe_limit
from edgellama.gate.references import References
from edgellama.gate.structure import check_files
from edgellama.gate.subject import Section, report_of
from edgellama.gate.text_checks import examine_texts
from edgellama.host.progress import Progress
from edgellama.host.threads import one_thread
from edgellama.host.torch_defaults import check_torch_defaults
from edgellama.report import Report
from edgellama.targets import Target, find_target
from edgellama.text.labelled import LabelledTexts
from edgellama.text.windows import WINDOW, Text, default_texts, windows

DEFAULT_TOKENS = 4096


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
    references: References | None = None,
    layers: bool = False,
    cross_check: bool | None = False,
    baseline: str | Path | None = None,
    max_kl_increase: float | None = None,
    relower: bool = True,
    swappable_adapters: Mapping[str, str | Path] | Sequence[str] = (),
    labelled: LabelledTexts | None = None,
    label_limits: LabelLimits | None = None,
    tune: LabelledTexts | None = None,
    progress: Progress | None = None,
) -> Report:
    """Runs the gate on one target of a bundle, and returns its report.

    Args:
        bundle: an open bundle, or the path of one.
        reference: the full-precision checkpoint that the bundle was made from. Without it, only the files and
            the artifact's consistency are checked. For a bundle of given codes it is the quantized checkpoint, or
            the model that was quantized: then quality alone is measured.
        target: name of the target; None for the bundle's first.
        texts: evaluation texts; None for those that ship with edgellama.
        tokens: number of tokens to score first; None for 4,096, or 1,024 if the runtime is slow here. More are
            scored if an interval straddles a limit.
        max_kl: limit for the mean KL, nats per token; None for the recipe's own.
        min_top1: limit for the share of positions whose top token agrees; None for no limit.
        max_ppl_ratio: limit for the perplexity of the artifact over the reference's; None for no limit.
        references: models that the caller has in memory; None to read, quantize or restore them.
        layers: also attribute the error to layers (edgellama.gate.attribution).
        cross_check: also compare the checkpoint with transformers' reading of it (edgellama.gate.cross_check).
            None for the first time that this checkpoint is examined, if transformers is installed.
        baseline: an earlier report of the same text, or a bundle that holds one, to compare window by window.
        max_kl_increase: largest increase of the mean KL over the baseline's, nats per token; None for 5 %.
        relower: lower the quantized model again, and compare the file with the result. An export leaves it out
            for an artifact that it has just lowered.
        swappable_adapters: directories of the bundle's adapters by name, or texts NAME=DIR, to judge them too. The
            report names those that were left out.
        labelled: labelled texts to judge a classifier on.
        label_limits: limits on these; None for none.
        tune: the labelled texts of the export's calibration, to compute temperature and threshold again. None to
            take the manifest's word, which the report says.
        progress: reporter of stages; None for a silent one.

    Raises InputError if the bundle or the reference cannot be used, and MissingDependencyError for a
    cross-check without transformers. A failed check
    raises nothing; see `passed`.

    >>> import edgellama
    >>> report = edgellama.validate(bundle, reference=model, tokens=1024, max_kl=0.5)
    >>> report.passed, report.quality["kl_mean"] < 0.5
    (True, True)
    """
    check_torch_defaults()
    progress = progress or Progress()
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    chosen_target = find_target(target or bundle.targets[0])
    limits = Limits(max_kl, min_top1, max_ppl_ratio)
    label_limits = label_limits or LabelLimits()
    _check_labelled(bundle, limits, labelled, label_limits, with_reference=reference is not None)
    if tune is not None:
        _check_tune(bundle, chosen_target, tune)
    if tokens is None:
        tokens = effort_for(chosen_target).tokens or DEFAULT_TOKENS
    check_tokens(tokens)
    regression.check_limit(max_kl_increase, baseline)
    if reference is None:
        _refuse_without_reference(limits, layers=layers, cross_check=bool(cross_check), baseline=baseline)
        if swappable_adapters:
            raise UsageError("adapters were given without their base", remedy="Add --reference CHECKPOINT.")
    if cross_check:
        check_installed()
    files = check_files(bundle)
    if files.verdict == "fail":
        return report_of(chosen_target, "not run", None, [Section((files,))])
    if reference is None:
        return _about(bundle, examined_alone(bundle, chosen_target, files, progress, tune))
    checkpoint = reference if isinstance(reference, Checkpoint) else open_checkpoint(reference)
    if bundle.classifier is not None:
        checkpoint = as_recorded(checkpoint, bundle.classifier, bundle.tokenizer)
    if is_original(bundle, checkpoint):
        if layers or cross_check or baseline is not None:
            raise UsageError(
                f"{checkpoint.path} is not the codes that {bundle.path} was made from, so only quality can be measured",
                remedy="Leave out --layers, --cross-check and --baseline, or give the codes as the reference.",
            )
        report = examined_original(
            bundle, chosen_target, checkpoint, files, texts or default_texts(), tokens, limits, progress
        )
        return _about(bundle, report)
    _check_source(bundle, checkpoint)
    checkpoint = checkpoint.with_stop_tokens(recorded_stop_tokens(bundle))
    texts = texts or default_texts()
    text_checks = examine_texts(bundle, texts)
    options = Options(
        texts,
        tokens,
        _with_recipes_kl(limits, bundle, checkpoint),
        layers,
        cross_check,
        relower,
        given_adapters(bundle, checkpoint, swappable_adapters),
        labelled,
        label_limits,
        tune,
    )
    earlier = (
        None if baseline is None else _read_baseline(baseline, bundle, chosen_target, checkpoint, options)
    )
    report = examined(
        bundle, chosen_target, references or References.of(checkpoint), files, text_checks, options, progress
    )
    report = _about(bundle, report)
    return report if earlier is None else regression.with_regression(report, earlier, max_kl_increase)


def _check_labelled(
    bundle: Bundle,
    limits: Limits,
    labelled: LabelledTexts | None,
    label_limits: LabelLimits,
    *,
    with_reference: bool,
) -> None:
    """Raises UsageError for questions that a classifier or a model of the next token cannot answer."""
    if bundle.classifier is not None and limits.max_ppl_ratio is not None:
        raise UsageError(
            f"{bundle.path} classifies texts, and has no perplexity",
            remedy="Leave out --max-ppl-ratio; --max-flips with --data limits a classifier.",
        )
    if labelled is None and label_limits != LabelLimits():
        raise UsageError("a limit on labelled texts was given without them", remedy="Add --data FILE.")
    if labelled is None:
        return
    if bundle.classifier is None:
        raise UsageError(
            f"{bundle.path} generates text, and labelled texts are for a classifier",
            remedy="Leave out --data, or export with --task classify.",
        )
    if not with_reference:
        raise UsageError(
            "flips are counted against the full-precision model, and none was given",
            remedy="Add --reference CHECKPOINT.",
        )
    token_ids(labelled, bundle.classifier, bundle.tokenizer, bundle.context_length)


def _check_tune(bundle: Bundle, target: Target, tune: LabelledTexts) -> None:
    """Raises UsageError for texts that the bundle was not calibrated on."""
    if bundle.classifier is None:
        raise UsageError(
            f"{bundle.path} generates text, and has no threshold",
            remedy="Leave out --tune, or export with --task classify.",
        )
    refuse_other_texts(bundle, target, tune)


def _about(bundle: Bundle, report: Report) -> Report:
    """The report with the hash of the artifact that it is about."""
    if report.runtime == "not run":
        return report
    return replace(report, artifact_sha256=bundle.artifact_sha256(report.target))


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
    baseline: str | Path, bundle: Bundle, target: Target, checkpoint: Checkpoint, options: Options
) -> Mapping[str, Any]:
    """Reads the earlier report, and checks its first windows against the windows to be scored."""
    earlier = regression.read_baseline(Path(baseline), target.name, checkpoint.sha256())
    length = min(WINDOW, bundle.context_length)
    first = islice(windows(options.texts, bundle.tokenizer, length), -(-options.tokens // length))
    regression.check_windows(list(first), earlier)
    return earlier
