"""Vectors of classifiers for tests.make_vectors: prompts, answers, sections of manifests, and a bundle to replay."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import write_manifest
from edgellama.bundle.golden import REFERENCE, Expectation, write_golden
from edgellama.checkpoints.pruned_vocabulary import UNKNOWN
from edgellama.errors import BundleError, ContextLengthError, UsageError
from edgellama.files import to_json
from edgellama.gate.golden_sequences import choose_sequences, top_k
from edgellama.model.labels import Calibrated, Classifier, Label, Threshold, Vocabulary
from edgellama.runtimes.classify import TextClassifier
from edgellama.text.label_prompt import prompt_ids
from tests.helpers.vector_bundle import manifest
from tests.make_vectors import (
    TEXTS,
    TYPED,
    device_logits,
    replayed,
    tokenizer_of,
    vector_text,
)

TARGET = "xnnpack"
# Rows of three labels, of which the second has one text and the others several.
ANSWERS = Classifier(
    "tokens",
    (
        Label("refund", (" refund", " Refund"), (260, 261), "asks for money back"),
        Label("delivery", (" delivery",), (262,)),
        Label("other é", (" other", " Other", " else"), (263, 264, 265)),
    ),
    "Which queue?\n{text}\nQueue:",
)
HEAD = Classifier("score", (Label("safe"), Label("unsafe")), "{text}", 0)
PAIRS = Classifier("tokens", (Label("a", ("1", "2"), (5, 6)), Label("b", ("3", "4"), (7, 8))), "{text}")
# Prompts by tokenizer, with the id of the padding.
PROMPTS: dict[str, tuple[tuple[str, int | None], ...]] = {
    "smollm2": (
        ("Text: {text}\nLabel:", None),
        ("{text}", 0),
        ("<|im_start|>user\nIs this rude?\n{text}<|im_end|>\n<|im_start|>assistant\n", 0),
        ("{ {x} } {text} {{}} {labels", None),
        ("{text}<|endoftext|><|endoftext|>", 0),
        ("a <|im_{text}end|> b", None),
    ),
    "llama3": (
        ("{text}", None),
        ("<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>", 604),
    ),
}
SEEN = 400  # tokens of the corpus of a pruned vocabulary
TEXTS_OF_PROMPTS = (*TYPED, "{text}", "{{text}} }{ {labels}", "end|> and <|im_", "the end<|endoftext|>")
# Temperature and threshold of the devices' artifact.
TEMPERATURE, THRESHOLD = 1.7, ("refund", 0.25)
SCALES = {"same": 0.0, "other rounding": 0.01, "damaged": 3.0}


def classify_vectors(bundle: Bundle) -> dict[str, Any]:
    """Content of classify.json for the bundle of `write_classifier`."""
    return {
        "prompts": prompts(),
        "answers": answers(),
        "sections": sections(bundle),
        "golden": replayed(bundle, {name: (scale, "x86-64") for name, scale in SCALES.items()}),
    }


def prompts() -> dict[str, Any]:
    """Token ids of texts in the prompts of classifiers; null with the reason for those that are refused."""
    classifiers = {
        (name, number): replace(ANSWERS, prompt=prompt, padding=padding)
        for name, templates in PROMPTS.items()
        for number, (prompt, padding) in enumerate(templates)
    }
    whole, count = classifiers["smollm2", 1], len(PROMPTS["smollm2"])
    for number, rule in enumerate(UNKNOWN):
        vocabulary = Vocabulary(tokenizer_of("smollm2").size, SEEN, rule, "0" * 64)
        classifiers["smollm2", count + number] = replace(whole, vocabulary=vocabulary)
    texts = [
        *((("smollm2", 0), text, 4096) for text in TEXTS),
        *((key, text, 4096) for key in classifiers for text in TEXTS_OF_PROMPTS),
        *((("smollm2", 1), "one two", length) for length in range(1, 8)),
    ]
    cases = []
    for key, text, length in texts:
        found: dict[str, Any] = {"ids": None, "refused": None}
        try:
            found["ids"] = prompt_ids(classifiers[key], tokenizer_of(key[0]), text, length)
        except ContextLengthError:
            found["refused"] = "context"
        except UsageError as error:
            found["refused"] = "unknown" if "pruned vocabulary" in str(error) else "empty"
        cases.append({"classifier": "{} {}".format(*key), "text": text, "context_length": length, **found})
    assert {case["refused"] for case in cases} == {None, "context", "empty", "unknown"}
    sections = {
        f"{name} {number}": {"tokenizer": name, "section": classifier.to_dict()}
        for (name, number), classifier in classifiers.items()
    }
    return {"classifiers": sections, "cases": cases}


LeastShare = tuple[str, float]
_LOGITS = (0.5, -1.25, 3.0, 2.5, 2.25, -8.0)
_MAX = float(np.finfo(np.float32).max)
# Name, classifier, temperature, threshold, logits. Null stands for NaN; 1e39 is infinite as a float32.
ANSWERED: tuple[tuple[str, Classifier, float | None, LeastShare | None, tuple[float | None, ...]], ...] = (
    ("no calibration", HEAD, None, None, (0.25, -1.5)),
    ("a temperature", HEAD, 2.5, None, (0.25, -1.5)),
    ("a tie goes to the first label", HEAD, None, None, (1.5, 1.5)),
    ("a flagged label that is not the answer", HEAD, 1.0, ("unsafe", 0.1), (1.0, -1.0)),
    ("an answer that is not flagged", HEAD, 1.0, ("unsafe", 0.9), (-1.0, 1.0)),
    ("one reaches a threshold of one", HEAD, 1.0, ("safe", 1.0), (_MAX, -_MAX)),
    ("zero reaches a threshold of zero", HEAD, 1.0, ("unsafe", 0.0), (_MAX, -_MAX)),
    ("zero does not reach more", HEAD, 1.0, ("unsafe", 5e-324), (_MAX, -_MAX)),
    ("several rows of a label are joined", ANSWERS, None, None, _LOGITS),
    ("the sum of rows wins over the largest", ANSWERS, None, None, (2.75, 2.75, 3.0, -9.0, -9.0, -9.0)),
    ("joined and calibrated", ANSWERS, 0.75, ("other é", 0.3), _LOGITS),
    ("rows that change places tie", PAIRS, None, None, (0.3, 1.7, 1.7, 0.3)),
    ("equal rows tie", PAIRS, 3.0, ("b", 0.1), (2.0, 2.0, 2.0, 2.0)),
    ("huge logits", ANSWERS, None, None, (_MAX, _MAX, -_MAX, -_MAX, _MAX, _MAX)),
    ("huge logits that tie", HEAD, None, None, (-_MAX, -_MAX)),
    ("tiny logits", ANSWERS, None, None, (1e-45, 0.0, -0.0, 0.0, -1e-45, 0.0)),
    ("negative zero ties", HEAD, None, None, (-0.0, 0.0)),
    ("a small temperature", HEAD, 1e-6, ("safe", 0.5), (1.0, 1.0000001)),
    ("a large temperature", HEAD, 1e38, ("unsafe", 0.49), (5.0, -5.0)),
    ("no number", HEAD, None, None, (None, 1.0)),
    ("no number at the end", ANSWERS, 1.0, ("refund", 0.0), (*_LOGITS[:5], None)),
    ("an infinite logit", HEAD, None, None, (1e39, 0.0)),
    ("a logit of minus infinity", HEAD, None, None, (0.0, -1e39)),
    ("only minus infinity", PAIRS, None, None, (-1e39,) * 4),
    ("a temperature that makes scores infinite", HEAD, 1e-300, None, (_MAX, -_MAX)),
)


def answers() -> list[dict[str, Any]]:
    """Answers that logits give; `answer` is null for logits that are refused."""
    cases = []
    for name, classifier, temperature, threshold, logits in ANSWERED:
        calibrated = None if temperature is None else calibration(temperature, threshold)
        judge = TextClassifier(classifier, tokenizer_of("smollm2"), calibrated, "0" * 64)
        values = np.array([np.nan if x is None else x for x in logits], np.float64)
        with np.errstate(over="ignore"):
            narrow = values.astype(np.float32)
        try:
            answer: dict[str, Any] | None = judge.answer(narrow, 3).to_dict()
        except BundleError:
            answer = None
        if answer is not None:
            answer["probabilities"] = list(answer["probabilities"].values())
        cases.append(
            {
                "name": name,
                "classifier": section(classifier, calibrated),
                "logits": list(logits),
                "answer": answer,
            }
        )
    assert [case["name"] for case in cases if case["answer"] is None] == [row[0] for row in ANSWERED[-6:]]
    return cases


def calibration(
    temperature: float, threshold: LeastShare | None = None, artifact_sha256: str = "0" * 64
) -> Calibrated:
    least = None if threshold is None else Threshold(*threshold, stated_fpr=0.05, measured_fpr=0.04)
    return Calibrated(artifact_sha256, "1" * 64, 20, temperature, 0.5, 0.4, least)


def section(classifier: Classifier, calibrated: Calibrated | None) -> dict[str, Any]:
    """The section of a manifest, with a calibration of TARGET."""
    if calibrated is None:
        return classifier.to_dict()
    threshold = calibrated.threshold and vars(calibrated.threshold)
    return {
        **classifier.to_dict(),
        "calibration": {TARGET: {**vars(calibrated), "threshold": threshold}},
    }


def sections(bundle: Bundle) -> list[dict[str, Any]]:
    """Sections in the manifest of `bundle`: whether it opens, and whether a text can be classified then."""
    sound: dict[str, Any] = copy.deepcopy(dict(bundle.manifest["classifier"]))
    rows = ANSWERS.rows
    calibrated = sound["calibration"][TARGET]
    labels = sound["labels"]
    alike = {**labels[1], "label": "other e\u0301"}

    def vocabulary(**changes: Any) -> dict[str, Any]:
        pruned = Vocabulary(tokenizer_of("smollm2").size, SEEN, "refuse", "0" * 64)
        return {**sound, "vocabulary": {**vars(pruned), **changes}}

    def label(**changes: Any) -> dict[str, Any]:
        return {**sound, "labels": [{**labels[0], **changes}, *labels[1:]]}

    def calibrated_by(**changes: Any) -> dict[str, Any]:
        return {**sound, "calibration": {TARGET: {**calibrated, **changes}}}

    def threshold(**changes: Any) -> dict[str, Any]:
        return calibrated_by(threshold={**calibrated["threshold"], **changes})

    cases: list[tuple[str, Any, int | None]] = [
        ("sound", sound, rows),
        ("without calibration", {k: v for k, v in sound.items() if k != "calibration"}, rows),
        ("without threshold", calibrated_by(threshold=None), rows),
        ("calibration of another target", {**sound, "calibration": {"onnx": calibrated}}, rows),
        ("names that look alike", {**sound, "labels": [labels[0], alike, labels[2]]}, rows),
        ("a threshold of one", threshold(probability=1), rows),
        ("a pruned vocabulary", vocabulary(), rows),
        ("another artifact", calibrated_by(artifact_sha256="0" * 64), rows),
        ("a threshold of an unknown label", threshold(label="refunds"), rows),
        ("no classifier", None, None),
        ("another head", {**sound, "head": "linear"}, rows),
        ("another pooling", {**sound, "pooling": "mean"}, rows),
        ("another problem", {**sound, "problem_type": "multi_label_classification"}, rows),
        ("no head", {k: v for k, v in sound.items() if k != "head"}, rows),
        ("one label", {**sound, "labels": labels[:1]}, 2),
        ("equal names", label(label="delivery"), rows),
        ("a blank name", label(label=" "), rows),
        ("labels that are no list", {**sound, "labels": {}}, rows),
        ("a label without rows", label(texts=[], tokens=[]), 4),
        ("more texts than tokens", label(tokens=[260]), 5),
        ("a negative token", label(tokens=[260, -1]), rows),
        ("a vocabulary of another rule", vocabulary(unknown="guess"), rows),
        ("a vocabulary that saw nothing", vocabulary(seen=0), rows),
        ("no place for the text", {**sound, "prompt": "Which queue?"}, rows),
        ("two places for the text", {**sound, "prompt": "{text}{text}"}, rows),
        ("a negative padding", {**sound, "padding": -1}, rows),
        ("a padding as text", {**sound, "padding": "0"}, rows),
        ("a temperature of zero", calibrated_by(temperature=0), rows),
        ("a negative temperature", calibrated_by(temperature=-1.5), rows),
        ("a temperature as text", calibrated_by(temperature="1"), rows),
        ("a threshold above one", threshold(probability=1.01), rows),
        ("a negative threshold", threshold(probability=-0.01), rows),
        ("a threshold without a label", calibrated_by(threshold={"probability": 0.5}), rows),
        ("other rows in the model", sound, rows + 1),
        ("no rows in the model", sound, None),
        ("rows without a classifier", None, rows),
    ]
    found = []
    for name, data, label_rows in cases:
        opens = classifies = False
        try:
            altered = reopened(bundle, data, label_rows)
            opens = True
            judge = TextClassifier.of(altered, TARGET)
            if judge is not None:
                judge.check()
                classifies = True
        except BundleError:
            pass
        found.append(
            {
                "name": name,
                "classifier": data,
                "label_rows": label_rows,
                "opens": opens,
                "classifies": classifies,
            }
        )
    assert [case["name"] for case in found if case["classifies"]] == [name for name, *_ in cases[:7]]
    assert [case["name"] for case in found if case["opens"]] == [name for name, *_ in cases[:10]]
    return found


def reopened(bundle: Bundle, data: Any, label_rows: int | None) -> Bundle:
    """The bundle with another section, and other rows in its model; None for none. Raises BundleError."""
    head = {
        **bundle.manifest,
        "model": {**bundle.manifest["model"], "label_rows": label_rows},
        "classifier": data,
    }
    if label_rows is None:
        del head["model"]["label_rows"]
    if data is None:
        del head["classifier"]
    file = bundle.path / "manifest.json"
    before = file.read_bytes()
    file.write_text(to_json(head), encoding="utf-8")
    try:
        return Bundle.open(bundle.path)
    finally:
        file.write_bytes(before)


def write_classifier(directory: Path) -> Bundle:
    """A bundle of a classifier, for tests of its manifest and its golden vectors. Its artifact is no model."""
    path, tokenizer = directory / "classifier", tokenizer_of("smollm2")
    (path / "tokenizer").mkdir(parents=True)
    (path / TARGET).mkdir()
    for name, content in tokenizer.files.items():
        (path / "tokenizer" / name).write_bytes(content)
    (path / "xnnpack/model.pte").write_bytes(b"not a model; the vectors say which labels it would give\n")
    head = manifest(tokenizer)
    head["name"] = "classifier"
    head["model"] |= {"label_rows": ANSWERS.rows, "tie_word_embeddings": False}
    head["artifacts"][0] |= {
        "bytes": 56,
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [1, ANSWERS.rows]}],
    }
    head["classifier"] = ANSWERS.to_dict()
    sha256 = write_manifest(path, head).artifact_sha256(TARGET)
    head["classifier"] = section(ANSWERS, calibration(TEMPERATURE, THRESHOLD, sha256))
    sequences = choose_sequences(tokenizer, None, [vector_text()], 64)
    positions = range(sum(s.scored for s in sequences))
    expected = {
        name: Expectation.of(
            np.stack([device_logits(p, scale, ANSWERS.rows) for p in positions]), top_k(ANSWERS.rows)
        )
        for name, scale in ((REFERENCE, 0.5), (TARGET, 0.0))
    }
    artifact = {
        "sha256": sha256,
        "runtime": "executorch-xnnpack",
        "kl_mean": 0.01,
        "top1_agreement": 1.0,
        "noise_floor_kl_mean": 0.0001,
        "noise_floor_kl_sequence": 0.0002,
    }
    limits = {TARGET: {"parity_kl_mean": 0.0003, "parity_kl_sequence": 0.0006}}
    write_golden(path, sequences, expected, {TARGET: artifact}, limits)
    return write_manifest(path, head)
