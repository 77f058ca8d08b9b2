"""A guard from export to answer, and planted faults of its policy and its answers, each found by the check that is named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.guard import as_guard
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.cli.dispatch import main
from edgellama.commands import validate_phases
from edgellama.commands.classify_task import ClassifyTask
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.errors import UsageError
from edgellama.model.guard import UNSAFE
from edgellama.model.labels import Label
from edgellama.runtimes.base import Logits, Runtime
from edgellama.runtimes.guard import CALLS, answered_categories
from edgellama.runtimes.load import load
from edgellama.text.label_prompt import prompt_ids
from tests.helpers.altered_bundles import altered, edit_manifest
from tests.helpers.tiny_classifier import halves, jsonl
from tests.helpers.tiny_guard import CATEGORIES, CONTEXT, judged_texts, write_guard

pytestmark = pytest.mark.slow

TARGETS = ("xnnpack", "onnx")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_guard(tiny_checkpoint, tmp_path_factory.mktemp("guard") / "model"))


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    tune, data = halves(judged_texts())
    task = ClassifyTask(guard=True, data=data, tune=tune, positive=UNSAFE, fpr=0.2, max_flips=0.5)
    return export(
        checkpoint,
        tmp_path_factory.mktemp("bundle") / "guard.edgellama",
        targets=TARGETS,
        recipe="int4-fast",
        context=CONTEXT,
        validation_tokens=256,
        max_kl=1.0,
        task=task,
    )


def failures(bundle: Bundle, checkpoint: Checkpoint, **options: Any) -> dict[str, str]:
    report = validate(bundle, reference=checkpoint.path, tokens=256, max_kl=1.0, relower=False, **options)
    return {c.name: c.detail for c in report.checks if c.verdict != "pass"}


def test_a_sound_guard_passes_and_answers(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Categories are those of a whole model that may write only well-formed answers."""
    for target in TARGETS:
        report = json.loads((bundle.path / f"reports/validate-{target}.json").read_text())
        names = {c["name"] for c in report["checks"]}
        assert {"labels.rows", "guard.parity", "guard.parity_worst", "data.flips_worst_group"} <= names
    classifier = bundle.classifier
    assert classifier is not None and classifier.guard is not None
    assert {c.code: c.name for c in classifier.guard.categories} == CATEGORIES
    assert bundle.config.label_rows == classifier.rows == len(set(classifier.tokens))
    with load(bundle, "onnx") as runtime:
        answers = [runtime.classify(row.text) for row in judged_texts().rows]
        assert {a.label for a in answers} <= {"safe", "unsafe"}
        assert all(bool(a.categories) == (a.label == UNSAFE or bool(a.flagged)) for a in answers)
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        read = prompt_ids(classifier, bundle.tokenizer, chat, CONTEXT)
        assert runtime.classify(chat).tokens == len(read)
        text = bundle.tokenizer.decode(read)
        assert "Is Agent safe?" in text and text.endswith("Agent: Hello\nAgent is:")


def test_categories_are_the_greedy_ones(checkpoint: Checkpoint) -> None:
    """The full-precision model as a runtime, against a loop that scores every token of the whole vocabulary."""
    guarded = as_guard(checkpoint, None)
    classifier, whole, own = guarded.classifier, StreamedLlama(checkpoint), StreamedLlama(guarded)
    assert classifier is not None and classifier.guard is not None

    class Streamed(Runtime):
        name, vocab_size, context_length = "streamed", guarded.config.vocab_size, CONTEXT
        seen: list[int] = []  # noqa: RUF012

        def _forward(self, tokens: Sequence[int], position: int) -> Logits:
            self.seen = [*(self.seen[:position] if position else []), *tokens]
            logits: Logits = own.logits(self.seen, [len(self.seen) - 1])[0].numpy()
            return logits

    for text in ("What a thing", "Once upon a time there was"):
        prompt = prompt_ids(classifier, guarded.tokenizer, text, CONTEXT)
        runtime = Streamed()
        runtime.forward(prompt)
        found = answered_categories(runtime, classifier)
        answer, tokens, choices = classifier.guard.start(), [*prompt, classifier.labels[1].tokens[0]], 0
        while choices < CALLS:
            allowed = answer.allowed()
            logits = whole.logits(tokens, [len(tokens) - 1])[0].numpy()
            choices += len(allowed) > 1
            best = max(allowed, key=lambda token: float(logits[token]))
            if (following := answer.then(best)) is None:
                break
            answer, tokens = following, [*tokens, best]
        assert found == answer.codes and found


def test_codes_that_change_places_in_the_manifest(
    bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def exchange(data: Any) -> None:
        one, other, _ = data["classifier"]["guard"]["categories"]
        one["code"], other["code"] = other["code"], one["code"]

    found = failures(altered(bundle, tmp_path, edit_manifest(exchange)), checkpoint, target="onnx")
    assert set(found) == {"labels.rows", "labels.calibration"} and "categories" in found["labels.rows"]


def test_a_policy_of_another_prompt(bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    def relax(data: Any) -> None:
        before = data["classifier"]["guard"]["conversation"]["before"]
        before["assistant"] = before["assistant"].replace("Fraud.", "Anything.")

    found = failures(altered(bundle, tmp_path, edit_manifest(relax)), checkpoint, target="onnx")
    assert "guard.conversation.before.assistant" in found["labels.rows"]


def test_decode_that_loses_the_prompt(
    bundle: Bundle, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime whose single tokens come at position 0: prefill is right, and categories are not."""

    class Forgetful(Runtime):
        def __init__(self, inner: Runtime) -> None:
            self.inner, self.name, self._output_size = inner, inner.name, inner.output_size
            self.vocab_size, self.context_length = inner.vocab_size, inner.context_length

        def _forward(self, tokens: Sequence[int], position: int) -> Logits:
            self.inner.position = 0 if len(tokens) == 1 else position
            return self.inner.forward(tokens)

    monkeypatch.setattr(validate_phases, "load", lambda *arguments: Forgetful(load(*arguments)))
    found = failures(bundle, checkpoint, target="onnx")
    assert {"guard.parity", "guard.parity_worst"} <= set(found) and "labels.parity" not in found


def test_the_command_line(
    checkpoint: Checkpoint, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, chat = tmp_path / "policy.json", tmp_path / "chat.json"
    policy.write_text(json.dumps({"A1": "Spoilers.", "A2": "Rudeness."}))
    chat.write_text(json.dumps([{"role": "user", "content": "The butler did it."}]))
    place = str(tmp_path / "own.edgellama")
    options = ["--task", "guard", "--categories", str(policy), "-r", "int4-fast", "-t", "onnx"]
    options += ["--context", str(CONTEXT), "--max-kl", "1", "-o", place]
    assert main(["export", str(checkpoint.path), *options]) == 0
    capsys.readouterr()
    assert main(["classify", place, "--chat", str(chat), "--json", str(tmp_path / "out.json")]) == 0
    (answer,) = json.loads((tmp_path / "out.json").read_text())["answers"]
    assert set(answer["answer"]["categories"]) <= {"A1", "A2"}
    out = capsys.readouterr().out
    assert out.startswith(("safe  ", "unsafe  ")) and "The butler did it." in out
    data = jsonl(judged_texts(), tmp_path / "data.jsonl")
    assert main(["classify", str(bundle.path), "--data", str(data)]) == 0
    chat.write_text('[{"role": "assistant", "content": "x"}]')
    assert main(["classify", place, "--chat", str(chat)]) == 2
    for text, words in (("[1]", "no conversation"), ("{", "not readable"), ("[]", "has the roles")):
        chat.write_text(text)
        assert main(["classify", place, "--chat", str(chat)]) == 2
        assert words in capsys.readouterr().err
    for text, words in (
        ('["S1"]', "no JSON object"),
        ('{"s1": "x"}', "no code"),
        ('{"S1": "a\\nb"}', "no name of one line"),
        ('{"S1": "a", "S1": "b"}', "are different"),
    ):
        policy.write_text(text)
        assert main(["export", str(checkpoint.path), *options[:-1], str(tmp_path / "new")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_options_that_a_guard_has_no_use_for(checkpoint: Checkpoint, tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError, match="its chat template is its prompt"):
        ClassifyTask(guard=True, prompt="{text}")
    with pytest.raises(UsageError, match="is for a guard"):
        ClassifyTask(labels=(Label("a", ("a",)),), categories=CATEGORIES)
    with pytest.raises(UsageError, match="names no token that ends an answer"):
        as_guard(checkpoint.with_options(config=replace(checkpoint.config, eos_token_ids=())), None)
