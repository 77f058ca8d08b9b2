"""Checks of a classifier that need no labelled texts, named `labels.*`.

Short prompts take the way of an app: the bundle's own prompt, its tokenizer, and one call of the artifact. The logits
that the labels are read from are compared with those of the quantized torch model after the token that counts.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from edgellama.bundle import Bundle
from edgellama.bundle.record import read_build_record
from edgellama.checkpoints.guard import recorded_categories
from edgellama.errors import ContextLengthError, UsageError
from edgellama.files import digest
from edgellama.gate.answer_calibration import deviations, recomputed
from edgellama.gate.differences import claim, differences
from edgellama.gate.guard_checks import check_guard_answers
from edgellama.gate.labelled import artifact_logits, last_logits, token_ids
from edgellama.gate.metrics import compare
from edgellama.gate.noise import Noise, geometric_mean, worst
from edgellama.gate.prefix_checks import check_prefix
from edgellama.gate.subject import Section, Subject
from edgellama.host.progress import Progress
from edgellama.model.labels import TEXT, Classifier
from edgellama.report import Check, below, check
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.prefix import Prefix
from edgellama.targets import Target
from edgellama.targets.provenance import COMPUTED
from edgellama.text.label_prompt import checked_prompt, prompt_ids
from edgellama.text.labelled import LabelledTexts
from edgellama.text.windows import default_texts

PROMPTS = 12  # of each text
LENGTHS = (60, 3, 200, 25)  # characters of the text in a prompt, in turn
# Largest deviation of a figure of the calibration: another processor rounds otherwise, by a tenth of it.
DEVIATION = 0.01


def examine_labels(subject: Subject, noise: Noise, tune: LabelledTexts | None, progress: Progress) -> Section:
    """The checks of a classifier; none for a bundle that generates text.

    noise: noise floor of parity. tune: texts of the calibration; None to compute none again.
    """
    bundle = subject.bundle
    if bundle.classifier is None:
        return Section()
    return Section(
        (
            check_rows(subject),
            *check_calibration(bundle, subject.target, subject.artifact, tune, progress),
            *_check_answers(subject, noise, progress),
            *check_prefix(bundle, subject.target, subject.artifact, prompts(bundle), noise, progress),
        )
    )


def check_rows(subject: Subject) -> Check:
    """Check that the labels, their texts and the ids of their rows are those of the checkpoint, in its order."""
    own, recorded = subject.checkpoint.classifier, subject.bundle.manifest["classifier"]
    expected = {} if own is None else own.to_dict()
    actual = {key: value for key, value in recorded.items() if key not in COMPUTED}
    if "prefix" not in actual:  # of a bundle whose prompts are fed whole
        expected.pop("prefix", None)
    problems = differences(actual, expected, "classifier")
    return claim("labels.rows", problems + _altered_requests(subject.bundle))


def _asked(bundle: Bundle) -> dict[str, Any]:
    """The options of the export's task, as the build record has them; empty without a record."""
    record = read_build_record(bundle)
    return {} if record is None else record["inputs"].get("classifier") or {}


def _altered_requests(bundle: Bundle) -> list[str]:
    """Parts of the classifier that are the user's choice, and not those that the export was asked for.

    The checkpoint cannot tell them, because the gate makes it a classifier of what the manifest says.
    """
    asked, classifier = _asked(bundle), bundle.classifier
    if not asked or classifier is None:
        return []
    actual, expected = dict[str, Any](), dict[str, Any]()
    if classifier.guard is None:
        names = {label.label: label.description for label in classifier.labels}
        actual["prompt"] = classifier.prompt
        expected["prompt"] = checked_prompt(asked.get("prompt") or TEXT, names)
    if asked.get("labels") is not None:
        actual["labels"] = digest([asdict(replace(label, tokens=())) for label in classifier.labels])
        expected["labels"] = asked["labels"]
    if classifier.guard is not None:
        categories = recorded_categories(classifier.guard)
        actual["categories"] = None if categories is None else digest(list(categories.items()))
        expected["categories"] = asked.get("categories")
    if classifier.vocabulary is not None:
        actual |= {"corpus": classifier.vocabulary.corpus_sha256, "unknown": classifier.vocabulary.unknown}
        expected |= {key: asked.get(key) for key in ("corpus", "unknown")}
    return differences(actual, expected, "classifier, as the export was asked for:")


def check_calibration(
    bundle: Bundle, target: Target, artifact: Runtime, tune: LabelledTexts | None, progress: Progress
) -> list[Check]:
    """Checks of temperature and threshold: their claims, and their values, computed again if `tune` is given."""
    checks = [check_calibration_claims(bundle, target)]
    if bundle.calibrated(target.name) is not None:
        checks.append(_check_values(bundle, target, artifact, tune, progress))
    return checks


def check_calibration_claims(bundle: Bundle, target: Target) -> Check:
    """Check that temperature and threshold carry this artifact's hash, and are those that the export was asked for."""
    classifier, calibration = bundle.classifier, bundle.calibrated(target.name)
    assert classifier is not None
    asked = _asked(bundle)
    path = f"classifier.calibration.{target.name}"
    if calibration is None:
        lost = [f"{path} is missing, and the export was given labelled texts"] if asked.get("tune") else []
        return claim("labels.calibration", lost, detail="not calibrated: temperature 1, no threshold")
    sha256 = bundle.artifact_sha256(target.name)
    problems = differences(calibration.artifact_sha256, sha256, f"{path}.artifact_sha256")
    threshold = calibration.threshold
    if threshold is not None and threshold.label not in classifier.names:
        problems.append(f"{path}.threshold is of {threshold.label!r}, which is no label")
    if asked:
        actual = (None, None) if threshold is None else (threshold.label, threshold.stated_fpr)
        problems += differences(calibration.data_sha256, asked.get("tune"), f"{path}.data_sha256")
        problems += differences(actual, (asked.get("positive"), asked.get("fpr")), f"{path}.threshold")
    detail = f"temperature {calibration.temperature:.3f} on {calibration.texts} texts"
    if threshold is not None:
        detail += f"; {threshold.label} from {threshold.probability:.4f}"
    return claim("labels.calibration", problems, detail=detail)


def refuse_other_texts(bundle: Bundle, target: Target, tune: LabelledTexts) -> None:
    """Raises UsageError for texts that an artifact's calibration was not computed on."""
    calibration = bundle.calibrated(target.name)
    if calibration is None:
        raise UsageError(
            f"{bundle.path} has no temperature and no threshold for {target.name}, so nothing can be computed again",
            remedy="Leave out --tune, or export with it.",
        )
    if tune.sha256 != calibration.data_sha256:
        raise UsageError(
            f"{tune.name} does not hold the texts that temperature and threshold were computed on (sha256 "
            f"{tune.sha256[:12]}…, the manifest says {calibration.data_sha256[:12]}…)",
            remedy="Give the file of the export's --tune, with its rows in their order.",
        )


def _check_values(
    bundle: Bundle, target: Target, artifact: Runtime, tune: LabelledTexts | None, progress: Progress
) -> Check:
    """Check that the artifact's own answers give the recorded temperature and threshold."""
    name, classifier, recorded = (
        "labels.calibration_values",
        bundle.classifier,
        bundle.calibrated(target.name),
    )
    assert classifier is not None and recorded is not None
    if tune is None:
        return Check(name, "pass", "not asked", None, "give the texts of the calibration with --tune")
    sequences = token_ids(tune, classifier, bundle.tokenizer, artifact.context_length)
    prefix = Prefix(classifier.prefix)
    scores = classifier.scores(artifact_logits(artifact, sequences, progress, prefix).numpy())
    if not np.isfinite(scores).all():
        return check(name, False, detail="logits are not finite")
    truth = np.array(tune.truth(classifier.names))
    if recorded.texts != len(truth):
        return check(
            name, False, value=recorded.texts, limit=len(truth), detail="the manifest's number of texts"
        )
    found = deviations(recorded, computed := recomputed(recorded, scores, truth, classifier.names))
    figure = max(found, key=lambda key: found[key])
    detail = f"largest deviation: {figure}; the artifact gives temperature {computed.temperature:.4f}"
    if computed.threshold is not None:
        detail += f", {computed.threshold.label} from {computed.threshold.probability:.4f}"
    return below(name, found[figure], DEVIATION, detail=detail)


def prompts(bundle: Bundle) -> list[list[int]]:
    """Token ids of the bundle's prompt around pieces of the evaluation texts, of several lengths."""
    classifier = bundle.classifier
    assert classifier is not None
    found = []
    for text in default_texts():
        for number in range(PROMPTS):
            start, length = number * len(text.content) // PROMPTS, LENGTHS[number % len(LENGTHS)]
            found.append(_fitting(bundle, classifier, text.content[start : start + length]))
    return found


def _fitting(bundle: Bundle, classifier: Classifier, text: str) -> list[int]:
    """Token ids of the prompt around as much of the text as fits the context."""
    while True:
        with suppress(ContextLengthError):
            return prompt_ids(classifier, bundle.tokenizer, text, bundle.context_length, any_text=True)
        text = text[: len(text) // 2]
        if not text:
            return prompt_ids(classifier, bundle.tokenizer, "a", bundle.context_length, any_text=True)


def _check_answers(subject: Subject, noise: Noise, progress: Progress) -> list[Check]:
    sequences = prompts(subject.bundle)
    artifact = artifact_logits(subject.artifact, sequences, progress)
    positions = compare(last_logits(subject.expected, sequences), artifact, None)
    largest = int(np.argmax(np.nan_to_num(positions.kl, nan=math.inf)))
    allowed = noise.limits(subject.target.parity_kl)
    guard = subject.bundle.classifier.guard if subject.bundle.classifier else None
    return [
        *([] if guard is None else check_guard_answers(subject, guard, sequences, noise)),
        below(
            "labels.parity",
            geometric_mean(positions.kl),
            allowed.run,
            detail=f"geometric mean of {len(sequences)} prompts, in one call each",
        ),
        below(
            "labels.parity_worst",
            worst(positions.kl),
            allowed.position,
            detail=f"a prompt of {len(sequences[largest])} tokens",
        ),
    ]
