"""Checks of a classifier that need no labelled texts, named `labels.*`.

Short prompts take the way of an app: the bundle's own prompt, its tokenizer, and one call of the artifact. The logits
that the labels are read from are compared with those of the quantized torch model after the token that counts.
"""

from __future__ import annotations

import math
from contextlib import suppress

import numpy as np

from edgellama.bundle import Bundle
from edgellama.errors import ContextLengthError
from edgellama.gate.differences import claim, differences
from edgellama.gate.labelled import artifact_logits, last_logits
from edgellama.gate.metrics import compare
from edgellama.gate.noise import Noise, geometric_mean, worst
from edgellama.gate.subject import Section, Subject
from edgellama.host.progress import Progress
from edgellama.model.labels import Classifier
from edgellama.report import Check, below
from edgellama.targets import Target
from edgellama.text.label_prompt import prompt_ids
from edgellama.text.windows import default_texts

PROMPTS = 12  # of each text
LENGTHS = (60, 3, 200, 25)  # characters of the text in a prompt, in turn


def examine_labels(subject: Subject, noise: Noise, progress: Progress) -> Section:
    """The checks of a classifier; none for a bundle that generates text.

    noise: noise floor of parity.
    """
    bundle = subject.bundle
    if bundle.classifier is None:
        return Section()
    return Section(
        (
            check_rows(subject),
            check_calibration(bundle, subject.target),
            *_check_answers(subject, noise, progress),
        )
    )


def check_rows(subject: Subject) -> Check:
    """Check that the labels, their texts and the ids of their rows are those of the checkpoint, in its order."""
    own, recorded = subject.checkpoint.classifier, subject.bundle.manifest["classifier"]
    expected = {} if own is None else own.to_dict()
    actual = {key: value for key, value in recorded.items() if key != "calibration"}
    return claim("labels.rows", differences(actual, expected, "classifier"))


def check_calibration(bundle: Bundle, target: Target) -> Check:
    """Check that temperature and threshold carry this artifact's hash and name a label. No value is computed again."""
    classifier, calibration = bundle.classifier, bundle.calibrated(target.name)
    assert classifier is not None
    if calibration is None:
        return claim("labels.calibration", [], detail="not calibrated: temperature 1, no threshold")
    sha256, path = bundle.artifact_sha256(target.name), f"classifier.calibration.{target.name}"
    problems = differences(calibration.artifact_sha256, sha256, f"{path}.artifact_sha256")
    threshold = calibration.threshold
    if threshold is not None and threshold.label not in classifier.names:
        problems.append(f"{path}.threshold is of {threshold.label!r}, which is no label")
    detail = f"temperature {calibration.temperature:.3f} on {calibration.texts} texts"
    if threshold is not None:
        detail += f"; {threshold.label} from {threshold.probability:.4f}"
    return claim("labels.calibration", problems, detail=detail)


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
            return prompt_ids(classifier, bundle.tokenizer, text, bundle.context_length)
        text = text[: len(text) // 2]
        if not text:
            return prompt_ids(classifier, bundle.tokenizer, "a", bundle.context_length)


def _check_answers(subject: Subject, noise: Noise, progress: Progress) -> list[Check]:
    sequences = prompts(subject.bundle)
    artifact = artifact_logits(subject.artifact, sequences, progress)
    positions = compare(last_logits(subject.expected, sequences), artifact, None)
    largest = int(np.argmax(np.nan_to_num(positions.kl, nan=math.inf)))
    allowed = noise.limits(subject.target.parity_kl)
    return [
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
