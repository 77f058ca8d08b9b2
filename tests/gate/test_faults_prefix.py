"""The fixed beginning of a prompt: computed once, restored from the bundle, and planted faults of its file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellama.bundle import Bundle
from edgellama.bundle.prefix import read_prefix, write_prefix
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.cli.dispatch import main
from edgellama.commands.classify_task import ClassifyTask
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.errors import BundleError, UsageError
from edgellama.recipe import find_recipe
from edgellama.runtimes.load import load
from edgellama.runtimes.prefix import Prefix, prefill
from edgellama.text.label_prompt import prompt_ids
from tests.helpers.altered_bundles import altered, edit_manifest
from tests.helpers.tiny_guard import CATEGORIES, CONTEXT, judged_texts, write_guard

pytestmark = pytest.mark.slow

TARGETS = ("onnx", "xnnpack", "coreml")
FILE = "prefix/onnx.safetensors"
OPTIONS: dict[str, Any] = {"recipe": "int4-fast", "context": CONTEXT}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_guard(tiny_checkpoint, tmp_path_factory.mktemp("guard") / "model"))


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("bundle") / "guard.edgellama"
    task = ClassifyTask(guard=True, prefix=True)
    return export(checkpoint, path, targets=TARGETS, task=task, validation_tokens=256, max_kl=1.0, **OPTIONS)


@pytest.fixture(scope="module")
def other(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same weights with a policy whose names differ, and whose beginning has as many tokens."""
    path = tmp_path_factory.mktemp("other") / "guard.edgellama"
    policy = {**CATEGORIES, "S2": "Theft."}
    task = ClassifyTask(guard=True, categories={**policy, "S1": "Fraud."}, prefix=True)
    return export(checkpoint, path, targets=("onnx",), task=task, validate=False, **OPTIONS)


def failures(bundle: Bundle, target: str = "onnx") -> dict[str, str]:
    return {c.name: c.detail for c in validate(bundle, target=target).checks if c.verdict != "pass"}


@pytest.mark.parametrize("target", TARGETS)
def test_a_prompt_behind_its_beginning_gives_the_logits_of_the_whole(bundle: Bundle, target: str) -> None:
    """And the text before has no effect: not on one bit."""
    classifier = bundle.classifier
    assert classifier is not None and len(classifier.prefix) > 16
    assert bundle.prefix_file("xnnpack") is None and bundle.prefix_file("onnx") is not None
    texts = [row.text for row in judged_texts().rows[:6]]
    ids = [prompt_ids(classifier, bundle.tokenizer, text, CONTEXT) for text in texts]
    with load(bundle, target) as runtime:
        assert runtime.can_rewind and runtime.text_classifier is not None
        prefix = runtime.text_classifier.prefix
        whole = [prefill(runtime, tokens, Prefix()) for tokens in ids]
        forth = [prefill(runtime, tokens, prefix).copy() for tokens in ids]
        assert runtime.cached == tuple(ids[-1]) and runtime.position == len(ids[-1])
        back = [prefill(runtime, tokens, prefix).copy() for tokens in reversed(ids)][::-1]
        runtime.reset()
        computed = [prefill(runtime, tokens, replace(prefix, file=None)).copy() for tokens in ids]
        for one, two, three, entire in zip(forth, back, computed, whole, strict=True):
            assert np.array_equal(one, two) and np.array_equal(one, three)
            assert np.allclose(one, entire, atol=1e-2)
        assert [runtime.classify(text).label for text in texts] == [
            runtime.classify(text).label for text in texts[::-1]
        ][::-1]


def test_the_cache_that_grows_takes_a_beginning_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe = replace(find_recipe("int4-fast"), name="grows", onnx_form="portable")
    task = ClassifyTask(guard=True, prefix=True)
    made = export(
        checkpoint,
        tmp_path / "p",
        targets=("onnx",),
        task=task,
        validate=False,
        recipe=recipe,
        context=CONTEXT,
    )
    checks = {c.name: c for c in validate(made).checks}
    assert checks["labels.prefix_parity"].verdict == "pass"
    assert checks["labels.prefix"].detail.endswith("restored")


def test_a_prompt_that_begins_otherwise_is_fed_whole(bundle: Bundle) -> None:
    """The agent's messages have another first line."""
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with load(bundle, "xnnpack") as runtime:
        before = runtime.classify("Hi")
        agent = runtime.classify(chat)
        assert runtime.classify("Hi") == before
        runtime.reset()
        assert runtime.classify(chat) == agent
    with load(bundle, "xnnpack") as runtime, pytest.raises(UsageError, match="cannot go back"):
        runtime.rewind(3)


def with_file(content: Callable[[Path], object]) -> Callable[[Path], None]:
    def alter(copy: Path) -> None:
        content(copy / FILE)

    return alter


def test_a_beginning_of_another_policy(bundle: Bundle, other: Bundle, tmp_path: Path) -> None:
    bad = altered(bundle, tmp_path, with_file(lambda file: shutil.copy(other.path / FILE, file)))
    found = failures(bad)
    assert set(found) == {"labels.prefix"} and "the beginning of another policy" in found["labels.prefix"]
    with load(bad, "onnx") as runtime, pytest.raises(BundleError, match="of another policy"):
        runtime.classify("x")


def test_a_beginning_of_another_policy_under_the_name_of_this_one(
    bundle: Bundle, other: Bundle, tmp_path: Path
) -> None:
    """The hashes in the file are right, and its keys and values are not."""
    theirs, ours = other.classifier, bundle.classifier
    assert theirs is not None and ours is not None and len(theirs.prefix) == len(ours.prefix)
    arrays = read_prefix(other.path / FILE, theirs.prefix, other.artifact_sha256("onnx"))
    sha256 = bundle.artifact_sha256("onnx")
    bad = altered(bundle, tmp_path, with_file(lambda file: write_prefix(file, ours.prefix, sha256, arrays)))
    assert set(failures(bad)) == {"labels.prefix_values"}


def test_a_beginning_of_another_artifact_or_shape(bundle: Bundle, tmp_path: Path) -> None:
    ours = bundle.classifier
    assert ours is not None
    sha256 = bundle.artifact_sha256("onnx")
    arrays = read_prefix(bundle.path / FILE, ours.prefix, sha256)
    short = {name: array[:, :, 1:] for name, array in arrays.items()}
    cases: tuple[tuple[str, Callable[[Path], object]], ...] = (
        ("another artifact", lambda file: write_prefix(file, ours.prefix, "0" * 64, arrays)),
        ("and a beginning has others", lambda file: write_prefix(file, ours.prefix, sha256, short)),
        ("not readable", lambda file: file.write_bytes(b"{}")),
    )
    for number, (words, content) in enumerate(cases):
        bad = altered(bundle, tmp_path / str(number), with_file(content))
        assert words in failures(bad)["labels.prefix"]


def test_tokens_that_are_not_those_of_the_prompt(bundle: Bundle, tmp_path: Path) -> None:
    bad = altered(bundle, tmp_path, edit_manifest(lambda data: data["classifier"]["prefix"].reverse()))
    assert "classifier.prefix is" in failures(bad, "xnnpack")["labels.prefix"]


def test_options(checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "export",
        str(checkpoint.path),
        "--context",
        str(CONTEXT),
        "-o",
        str(tmp_path / "x"),
        "--prefix",
    ]
    assert main(command) == 2 and "is for a classifier" in capsys.readouterr().err
    assert main([*command, "--task", "guard"]) == 2 and "holds it inside" in capsys.readouterr().err
    labels = tmp_path / "labels.json"
    labels.write_text('[{"label": "a", "text": " a"}, {"label": "b", "text": " b"}]')
    short = ["--task", "classify", "--labels", str(labels), "--prompt", "{text} is"]
    assert main([*command, *short, "-t", "onnx"]) == 2
    assert "none of 16 tokens" in capsys.readouterr().err
