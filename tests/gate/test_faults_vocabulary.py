"""A classifier whose embedding has the rows of a corpus alone, from export to answer, and planted faults of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.pruned_vocabulary import Corpus, read_corpus
from edgellama.cli.dispatch import main
from edgellama.commands.classify_task import ClassifyTask
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.errors import TextError, UsageError
from edgellama.model.labels import Label
from edgellama.runtimes.load import load
from tests.helpers.altered_bundles import altered, edit_file
from tests.helpers.tiny_classifier import CONTEXT, evaluation_texts, jsonl, write_classifier
from tests.helpers.tiny_guard import write_guard

pytestmark = pytest.mark.slow

TEXTS = tuple(row.text for row in evaluation_texts().rows)
OPTIONS: dict[str, Any] = {"recipe": "int4-fast", "context": CONTEXT, "validation_tokens": 256, "max_kl": 2.0}
TARGETS = ("xnnpack", "onnx")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_classifier(tiny_checkpoint, tmp_path_factory.mktemp("classifier") / "model"))


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("bundle") / "small.edgellama"
    task = ClassifyTask(data=evaluation_texts(), corpus=Corpus(TEXTS, "refuse"))
    return export(checkpoint, path, targets=TARGETS, task=task, **OPTIONS)


def test_a_pruned_classifier_passes_and_answers_as_the_whole_one(
    bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    whole = export(
        checkpoint,
        tmp_path / "whole",
        targets=("onnx",),
        task=ClassifyTask(),
        validate=False,
        recipe="int4-fast",
        context=CONTEXT,
    )
    rows = bundle.config.vocab_size
    assert rows < whole.config.vocab_size and bundle.classifier is not None
    assert bundle.classifier.vocabulary is not None and bundle.classifier.vocabulary.rows == rows
    saved = whole.artifact_entry("onnx")["bytes"] - bundle.artifact_entry("onnx")["bytes"]
    assert saved >= (whole.config.vocab_size - rows) * bundle.config.hidden_size
    with load(bundle, "onnx") as small, load(whole, "onnx") as large:
        for text in TEXTS[:20]:
            one, other = (list(r.classify(text).probabilities.values()) for r in (small, large))
            assert np.allclose(one, other, atol=1e-5), (
                "the embedding has a scale a row, so nothing else changed"
            )
    report = validate(bundle, reference=checkpoint.path, tokens=256, max_kl=2.0, relower=False, target="onnx")
    assert [c.name for c in report.checks if c.verdict != "pass"] == []


def test_a_text_with_other_tokens_is_refused_or_taken(
    bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with load(bundle, "onnx") as runtime, pytest.raises(UsageError, match="never has as a piece"):
        runtime.classify("你好")
    task = ClassifyTask(corpus=Corpus(TEXTS, "bytes"))
    loose = export(
        checkpoint,
        tmp_path / "b",
        targets=("onnx",),
        task=task,
        validate=False,
        recipe="int4-fast",
        context=CONTEXT,
    )
    with load(loose, "onnx") as runtime:
        assert runtime.classify("你好").tokens > 2


def test_two_tokens_that_change_places(bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The rows of the embedding are then those of other pieces."""

    def exchange(copy: Path) -> None:
        file = copy / "tokenizer/tokenizer.json"
        data = json.loads(file.read_text())
        vocabulary = data["model"]["vocab"]
        one, other = (piece for piece, row in vocabulary.items() if row in (40, 41))
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        file.write_text(json.dumps(data))

    bad = altered(bundle, tmp_path, exchange)
    report = validate(bad, reference=checkpoint.path, tokens=256, max_kl=2.0, relower=False, target="onnx")
    found = {c.name for c in report.checks if c.verdict != "pass"}
    assert {"structure.codes", "structure.tokenizer"} <= found


@pytest.mark.parametrize("changes", [{"unknown": "bytes"}, {"seen": 1}, {"corpus_sha256": "0" * 64}])
def test_a_rule_that_was_relaxed_is_seen(
    changes: dict[str, Any], bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A manifest that lets more texts pass, or tells another corpus."""
    vocabulary = bundle.manifest["classifier"]["vocabulary"]
    assert all(vocabulary[key] != value for key, value in changes.items())
    relax = edit_file("manifest.json", lambda data: data["classifier"]["vocabulary"].update(changes))
    bad = altered(bundle, tmp_path, relax)
    report = validate(bad, reference=checkpoint.path, tokens=256, max_kl=2.0, relower=False, target="onnx")
    assert "labels.rows" in {c.name for c in report.checks if c.verdict == "fail"}


def test_labels_and_guards_are_pruned_too(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    corpus = Corpus(TEXTS[:30], "bytes")
    plain = tiny_checkpoint.first_layers(1)
    labels = (Label("novel", (" novel", " story")), Label("program", (" def",)))
    asked = ClassifyTask(labels=labels, prompt="{text}\nKind:", corpus=corpus)
    guard = open_checkpoint(write_guard(tiny_checkpoint, tmp_path / "guard"))
    for name, source, task in (
        ("labels", plain, asked),
        ("guard", guard, ClassifyTask(guard=True, corpus=corpus)),
    ):
        path = tmp_path / f"{name}.edgellama"
        bundle = export(source, path, targets=("onnx",), task=task, **{**OPTIONS, "context": 192})
        assert bundle.config.vocab_size < plain.config.vocab_size
        with load(bundle) as runtime:
            assert runtime.classify("It was a dark night").label in {"novel", "program", "safe", "unsafe"}


@pytest.mark.parametrize("altered_part", ["names", "prompt", "policy"])
def test_what_the_user_asked_for_is_not_altered(
    altered_part: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Names of two labels exchanged, another prompt, or a milder name of a category, each in the manifest alone."""

    def alter(data: dict[str, Any]) -> None:
        section = data["classifier"]
        one, other = section["labels"][:2]
        if altered_part == "names":
            one["label"], other["label"] = other["label"], one["label"]
        elif altered_part == "prompt":
            section["prompt"] = section["prompt"].replace("Kind", "Sort")
        else:
            text = section["guard"]["conversation"]["before"]
            for role in text:
                text[role] = text[role].replace("Fraud.", "Cheats")
            section["guard"]["categories"][1]["name"] = "Cheats"
            section["prompt"] = section["prompt"].replace("Fraud.", "Cheats")

    if altered_part == "policy":
        source = open_checkpoint(write_guard(tiny_checkpoint, tmp_path / "guard"))
        task = ClassifyTask(guard=True, categories={"S1": "Theft.", "S2": "Fraud."})
    else:
        source = tiny_checkpoint.first_layers(1)
        labels = (Label("novel", (" novel", " story")), Label("program", (" def",)))
        task = ClassifyTask(labels=labels, prompt="{text}\nKind:")
    bundle = export(
        source,
        tmp_path / "sound",
        targets=("onnx",),
        task=task,
        recipe="int4-fast",
        context=192,
        validate=False,
    )

    def failed(judged: Bundle) -> set[str]:
        report = validate(judged, reference=source, tokens=256, max_kl=2.0, relower=False, target="onnx")
        return {c.name for c in report.checks if c.verdict == "fail"}

    assert failed(bundle) == set()
    assert "labels.rows" in failed(altered(bundle, tmp_path, edit_file("manifest.json", alter)))


def test_the_command_line(checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = jsonl(evaluation_texts(), tmp_path / "texts.jsonl")
    plan = [
        "export",
        str(checkpoint.path),
        "--task",
        "classify",
        "--plan",
        "--json",
        str(tmp_path / "plan.json"),
    ]
    assert main([*plan, "--prune-vocabulary", str(texts)]) == 2
    assert "needs a rule" in capsys.readouterr().err
    assert main(plan) == 0
    before = json.loads((tmp_path / "plan.json").read_text())
    assert main([*plan, "--prune-vocabulary", str(texts), "--unknown", "bytes"]) == 0
    after = json.loads((tmp_path / "plan.json").read_text())
    sizes = [data["artifacts"][0]["bytes"] for data in (before, after)]
    assert sizes[1] < sizes[0]


def test_files_of_a_corpus(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("one\n\ntwo\n")
    assert read_corpus(file, "bytes").texts == ("one", "two")
    for content, words in ((b"\n", "holds no text"), (b"\xff", "not readable as UTF-8")):
        file.write_bytes(content)
        with pytest.raises(TextError, match=words):
            read_corpus(file, "bytes")
    assert replace(Corpus(("a",), "bytes"), unknown="refuse").sha256 == Corpus(("a",), "bytes").sha256
