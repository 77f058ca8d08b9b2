"""Gate of a classifier on the user's labelled texts: the checks named `data.*`.

Averages hide a group. A quantized guard may gain on English and double its false positives in German, so every
question is asked of all texts and of each group, and the worst group decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.errors import UsageError
from edgellama.gate.flips import Answers, false_positives, mcnemar, paired_difference, rate, summarize
from edgellama.gate.limits import ERROR
from edgellama.gate.references import QuantizedReference
from edgellama.gate.subject import Section, Subject
from edgellama.host.progress import Progress
from edgellama.model.labels import Calibrated, Classifier, log_probabilities
from edgellama.model.layer_pass import groups
from edgellama.report import Check, below, check
from edgellama.report.checks import worst_verdict
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.prefix import Prefix, prefill
from edgellama.text.label_prompt import prompt_ids
from edgellama.text.labelled import LabelledTexts
from edgellama.text.tokenizer import Tokenizer

BATCH_BYTES = 1 << 27  # of hidden states that are computed side by side
SHOWN = 20  # flips in a report
NO_PREFIX = Prefix()


@dataclass(frozen=True)
class LabelLimits:
    """Limits of a classifier that a user gives. None stands for no limit. Raises UsageError for one out of range.

    Attributes:
        max_flips: share of texts whose answer is not the full-precision model's, of all texts and of the worst group.
        max_fpr_increase: increase of the false-positive rate of any label, of all texts and of the worst group.
    """

    max_flips: float | None = None
    max_fpr_increase: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_flips", "max_fpr_increase"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UsageError(f"{name} must lie in [0, 1), got {value!r}", remedy="Correct the limit.")


def token_ids(
    texts: LabelledTexts, classifier: Classifier, tokenizer: Tokenizer, context_length: int
) -> list[list[int]]:
    """Token ids that the classifier reads for each text. Raises ContextLengthError for one that does not fit."""
    texts.check_labels(classifier.names)
    return [prompt_ids(classifier, tokenizer, row.text, context_length) for row in texts.rows]


def last_logits(model: StreamedLlama | QuantizedReference, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Logits after the last token of each sequence, float32 [N, rows], many sequences side by side."""
    config = model.config if isinstance(model, StreamedLlama) else model.model.config
    rows: list[Tensor] = []
    for batch in groups(sequences, BATCH_BYTES // (4 * config.hidden_size)):
        model.read_ahead(batch)
        rows += [model.logits(tokens, [len(tokens) - 1]) for tokens in batch]
    return torch.cat(rows)


def artifact_logits(
    artifact: Runtime, sequences: Sequence[Sequence[int]], progress: Progress, prefix: Prefix = NO_PREFIX
) -> Tensor:
    """Logits of an artifact after each sequence, fed as an app does: float32 [N, rows].

    prefix: beginning that is computed once. Without it, each sequence is one call.
    """
    rows = []
    with progress.bar("classify", len(sequences), "text") as bar:
        for tokens in sequences:
            rows.append(torch.from_numpy(prefill(artifact, tokens, prefix).copy()))
            bar.update(1)
    return torch.stack(rows)


def examine_labelled(
    subject: Subject, texts: LabelledTexts, limits: LabelLimits, progress: Progress
) -> Section:
    """The section `labelled` of a report, and the checks named `data.*`."""
    classifier = subject.bundle.classifier
    assert classifier is not None
    sequences = token_ids(texts, classifier, subject.bundle.tokenizer, subject.artifact.context_length)
    calibration = subject.bundle.calibrated(subject.target.name)
    prefix = Prefix(classifier.prefix)
    artifact = classifier.scores(artifact_logits(subject.artifact, sequences, progress, prefix).numpy())
    broken = int((~np.isfinite(artifact)).any(-1).sum())
    if broken:
        detail = f"logits of {broken} of {len(sequences)} texts are not finite"
        return Section((check("data.finite", False, value=broken, limit=0, detail=detail),))
    answers = Answers(
        np.array(texts.truth(classifier.names)),
        classifier.scores(last_logits(subject.full, sequences).numpy()),
        artifact,
        1.0 if calibration is None else calibration.temperature,
    )
    return judged(answers, texts, classifier.names, calibration, limits)


def judged(
    answers: Answers,
    texts: LabelledTexts,
    names: tuple[str, ...],
    calibration: Calibrated | None,
    limits: LabelLimits,
) -> Section:
    """Section and checks of the answers on labelled texts."""
    groups = {name: answers.of(np.array([row.group == name for row in texts.rows])) for name in texts.groups}
    several = groups if len(groups) > 1 else {}
    fields = {
        "sha256": texts.sha256,
        "labels": list(names),
        "temperature": answers.temperature,
        **summarize(answers, names),
        "groups": {name: summarize(part, names) for name, part in several.items()},
        "worst_flips": _worst_flips(answers, texts, names),
    }
    checks = [
        *_accuracy(answers, several),
        *_flips(answers, several, limits),
        *_false_positives(answers, several, names, limits),
        *_threshold(answers, several, names, calibration),
    ]
    return Section(tuple(checks), {"labelled": fields})


def _accuracy(answers: Answers, groups: Mapping[str, Answers]) -> list[Check]:
    """Checks that the artifact is not significantly less accurate, by the test of McNemar."""

    def ask(part: Answers, error: float) -> Check:
        right = [x.argmax(-1) == part.truth for x in (part.reference, part.artifact)]
        lost, won = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
        p = mcnemar(lost, won)
        detail = (
            f"{right[0].mean():.1%} -> {right[1].mean():.1%}, {lost} lost and {won} won of {len(part)} (p)"
        )
        return check("data.accuracy", p >= error, value=p, limit=error, detail=detail)

    return _asked(ask, answers, groups, lambda c: -float(c.value or 0))


def _flips(answers: Answers, groups: Mapping[str, Answers], limits: LabelLimits) -> list[Check]:
    limit = limits.max_flips
    if limit is None:
        return []

    def ask(part: Answers, error: float) -> Check:
        count = int((part.reference.argmax(-1) != part.artifact.argmax(-1)).sum())
        share = rate(count, len(part), error)
        detail = f"{count} of {len(part)} texts, [{share.low:.4f}, {share.high:.4f}]"
        return below("data.flips", share.mean, limit, interval=(share.low, share.high), detail=detail)

    return _asked(ask, answers, groups)


def _false_positives(
    answers: Answers, groups: Mapping[str, Answers], names: tuple[str, ...], limits: LabelLimits
) -> list[Check]:
    limit = limits.max_fpr_increase
    if limit is None:
        return []

    def ask(part: Answers, error: float) -> Check:
        return _worst(
            [_fpr_increase(part, label, name, limit, error / len(names)) for label, name in enumerate(names)]
        )

    return _asked(ask, answers, groups)


def _fpr_increase(part: Answers, label: int, name: str, limit: float, error: float) -> Check:
    before, after = (
        false_positives(part.truth, scores.argmax(-1), label) for scores in (part.reference, part.artifact)
    )
    if not len(before):
        return check("data.fpr_increase", True, value=0.0, limit=limit, detail=f"{name}: no other texts")
    change = paired_difference(after, before, error)
    detail = (
        f"{name}: {before.mean():.4f} -> {after.mean():.4f} of {len(before)} texts, "
        f"[{change.low:+.4f}, {change.high:+.4f}]"
    )
    interval = (change.low, change.high)
    return below("data.fpr_increase", change.mean, limit, interval=interval, detail=detail)


def _threshold(
    answers: Answers, groups: Mapping[str, Answers], names: tuple[str, ...], calibration: Calibrated | None
) -> list[Check]:
    """Checks that the false positives at the threshold are not significantly more than the stated share."""
    if calibration is None or calibration.threshold is None or calibration.threshold.label not in names:
        return []
    threshold = calibration.threshold
    label = names.index(threshold.label)

    def ask(part: Answers, error: float) -> Check:
        logs = log_probabilities(part.artifact[part.truth != label], part.temperature)[:, label]
        count = int((np.exp(logs) >= threshold.probability).sum())
        share = rate(count, len(logs), error)
        return check(
            "data.threshold_fpr",
            share.low <= threshold.stated_fpr,
            value=share.mean,
            limit=threshold.stated_fpr,
            detail=f"{threshold.label} from {threshold.probability:.4f}: {count} of {len(logs)} texts, "
            f"at least {share.low:.4f}",
        )

    return _asked(ask, answers, groups, lambda c: float(c.value or 0))


def _asked(ask: Any, answers: Answers, groups: Mapping[str, Answers], key: Any = None) -> list[Check]:
    """A question asked of all texts, and of each group. The worst group is one check of its own.

    The error is divided by the number of groups, so that many groups do not fail by chance.
    """
    checks = [ask(answers, ERROR)]
    if groups:
        parts = {name: ask(part, ERROR / len(groups)) for name, part in groups.items()}
        worst = _worst(list(parts.values()), key)
        name = next(name for name, c in parts.items() if c is worst)
        checks.append(
            Check(
                f"{worst.name}_worst_group",
                worst.verdict,
                worst.value,
                worst.limit,
                f"{name} of {len(groups)} groups: {worst.detail}",
            )
        )
    return checks


def _worst(checks: Sequence[Check], key: Any = None) -> Check:
    """The check with the worst verdict. Of several, that with the largest `key`, by default the value."""
    verdict = worst_verdict(c.verdict for c in checks)
    return max((c for c in checks if c.verdict == verdict), key=key or (lambda c: float(c.value or 0)))


def _worst_flips(answers: Answers, texts: LabelledTexts, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The flips whose probability of the true label fell most."""
    before, after = (
        log_probabilities(scores, answers.temperature) for scores in (answers.reference, answers.artifact)
    )
    rows = np.arange(len(answers))
    loss = np.exp(before[rows, answers.truth]) - np.exp(after[rows, answers.truth])
    flipped = np.flatnonzero(before.argmax(-1) != after.argmax(-1))
    order = sorted(flipped.tolist(), key=lambda row: (-loss[row], row))[:SHOWN]
    return [
        {
            "row": row + 1,
            "text": texts.rows[row].text[:200],
            "group": texts.rows[row].group,
            "label": texts.rows[row].label,
            "reference": names[int(before[row].argmax())],
            "artifact": names[int(after[row].argmax())],
            "reference_probability": float(np.exp(before[row].max())),
            "artifact_probability": float(np.exp(after[row].max())),
        }
        for row in order
    ]
