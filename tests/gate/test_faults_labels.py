"""Planted faults of classifiers, each found by the check that is named, and the verbs that refuse them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.cli.dispatch import main
from edgellama.commands import validate_phases
from edgellama.commands.classify_task import ClassifyTask
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.errors import BundleError, UsageError
from edgellama.export import pipeline
from edgellama.export.lower import lowering_for
from edgellama.model.llama import Llama
from edgellama.runtimes.base import Logits, Runtime
from edgellama.runtimes.load import load
from edgellama.text.labelled import LabelledTexts
from tests.helpers.altered_bundles import altered, edit_manifest
from tests.helpers.tiny_classifier import (
    CONTEXT,
    LABELS,
    evaluation_texts,
    halves,
    jsonl,
    write_classifier,
)

pytestmark = pytest.mark.slow

TARGETS = ("xnnpack", "onnx", "coreml")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_classifier(tiny_checkpoint, tmp_path_factory.mktemp("classifier") / "model"))


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Exported with the gate for all targets, calibrated on texts that the gate does not judge."""
    tune, data = halves(evaluation_texts())
    task = ClassifyTask(data=data, tune=tune, positive="program", fpr=0.1, max_flips=0.5)
    path = tmp_path_factory.mktemp("bundle") / "kinds.edgellama"
    return export(
        checkpoint,
        path,
        targets=TARGETS,
        recipe="int4-fast",
        context=CONTEXT,
        validation_tokens=256,
        max_kl=1.0,
        task=task,
    )


def swap(weight: Any) -> None:
    """Exchanges the first two rows of a quantized weight, in place."""
    for part in (weight.qdata, weight.scale):
        part.copy_(part[torch.tensor([1, 0, 2])].clone())


def failures(bundle: Bundle, checkpoint: Checkpoint, **options: Any) -> dict[str, str]:
    """Name and detail of the checks that do not pass."""
    report = validate(bundle, reference=checkpoint.path, tokens=256, max_kl=1.0, relower=False, **options)
    return {c.name: c.detail for c in report.checks if c.verdict != "pass"}


def test_a_sound_classifier_passes_on_every_target(bundle: Bundle, checkpoint: Checkpoint) -> None:
    reports = [json.loads((bundle.path / f"reports/validate-{t}.json").read_text()) for t in TARGETS]
    for report in reports:
        names = {check["name"] for check in report["checks"]}
        assert {"labels.rows", "labels.calibration", "labels.parity", "data.flips_worst_group"} <= names
        assert not {"ppl_artifact", "greedy_prefix_agreement", "rms_dp"} & report["quality"].keys()
        assert not report.get("samples") and "nll_artifact" not in report["scored"]["windows"][0]
        assert set(report["labelled"]["groups"]) == {"long", "short"}
    assert failures(bundle, checkpoint, labelled=halves(evaluation_texts())[1]) == {}
    for target in TARGETS:
        with load(bundle, target) as runtime:
            assert runtime.output_size == len(runtime.forward([1, 2])) == len(LABELS)
            answer = runtime.classify(evaluation_texts().rows[0].text)
        assert answer.label == max(answer.probabilities, key=lambda name: answer.probabilities[name])
        assert sum(answer.probabilities.values()) == pytest.approx(1)
        assert answer.flagged is not None


def test_labels_that_change_places_in_the_manifest(
    bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    swapped = altered(bundle, tmp_path, edit_manifest(lambda data: data["classifier"]["labels"].reverse()))
    found = failures(swapped, checkpoint)
    assert set(found) == {"labels.rows", "labels.calibration"}, "the artifact is bound to its labels"
    assert "labels[0].label is 'program'" in found["labels.rows"]


def test_label_rows_that_change_places_in_the_artifact(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapping(*arguments: Any) -> Any:
        def lower(model: Llama, *rest: Any, **options: Any) -> None:
            head: Any = model.lm_head.weight
            swap(head)
            lowering_for(*arguments)(model, *rest, **options)
            swap(head)

        return lower

    monkeypatch.setattr(pipeline, "lowering_for", swapping)
    options: Any = {"targets": ["onnx"], "recipe": "int4-fast", "context": CONTEXT, "validate": False}
    bad = export(checkpoint, tmp_path / "bad", task=ClassifyTask(), **options)
    found = failures(bad, checkpoint)
    assert {"structure.codes", "parity.kl", "labels.parity"} <= set(found)


def test_logits_of_another_position(
    bundle: Bundle, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that answers a call of several tokens with the logits of the last but one."""

    class Early(Runtime):
        def __init__(self, inner: Runtime) -> None:
            self.inner, self.name, self._output_size = inner, inner.name, inner.output_size
            self.vocab_size, self.context_length = inner.vocab_size, inner.context_length

        def _forward(self, tokens: Sequence[int], position: int) -> Logits:
            self.inner.position = position
            if len(tokens) == 1:
                return self.inner.forward(tokens)
            logits = self.inner.forward(tokens[:-1]).copy()
            self.inner.forward(tokens[-1:])
            return logits

    monkeypatch.setattr(validate_phases, "load", lambda *arguments: Early(load(*arguments)))
    found = failures(bundle, checkpoint)
    assert {"labels.parity", "labels.parity_worst", "consistency.prefill_decode"} <= set(found)


def test_pooling_at_the_padding(bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Without the id of the padding, the logits after the padding would count."""
    bad = altered(bundle, tmp_path, edit_manifest(lambda data: data["classifier"].update(padding=None)))
    assert "padding is None, expected 0" in failures(bad, checkpoint)["labels.rows"]


def test_a_threshold_of_another_artifact(bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    def exchange(data: Any) -> None:
        calibration = data["classifier"]["calibration"]
        calibration["xnnpack"], calibration["onnx"] = calibration["onnx"], calibration["xnnpack"]

    bad = altered(bundle, tmp_path, edit_manifest(exchange))
    assert set(failures(bad, checkpoint)) == {"labels.calibration"}
    alone = validate(bad)
    assert [c.name for c in alone.checks if c.verdict != "pass"] == ["labels.calibration"]
    with load(bad, "xnnpack") as runtime, pytest.raises(BundleError, match="another artifact"):
        runtime.classify("x")


@pytest.mark.parametrize(
    ("figure", "alter"),
    [
        ("temperature", lambda data: data.update(temperature=data["temperature"] * 1.05)),
        ("threshold.probability", lambda data: data["threshold"].update(probability=0.02)),
        ("threshold.measured_fpr", lambda data: data["threshold"].update(measured_fpr=0.0)),
        ("nll_after", lambda data: data.update(nll_after=data["nll_after"] / 2)),
    ],
)
def test_an_altered_temperature_or_threshold(
    bundle: Bundle, figure: str, alter: Callable[[Any], None], tmp_path: Path
) -> None:
    def edit(data: Any) -> None:
        alter(data["classifier"]["calibration"]["onnx"])

    tune, _ = halves(evaluation_texts())
    sound = validate(bundle, target="onnx", tune=tune)
    (found,) = (c for c in sound.checks if c.name == "labels.calibration_values")
    assert sound.passed and found.value == 0, "the same processor gives the same figures"
    bad = altered(bundle, tmp_path, edit_manifest(edit))
    report = validate(bad, target="onnx", tune=tune)
    assert [c.name for c in report.checks if c.verdict != "pass"] == ["labels.calibration_values"]
    assert figure in next(c.detail for c in report.checks if c.name == "labels.calibration_values")
    unasked = next(c for c in validate(bad, target="onnx").checks if c.name == "labels.calibration_values")
    assert unasked.value == "not asked" and "--tune" in unasked.detail


def test_a_threshold_that_was_not_asked_for(bundle: Bundle, tmp_path: Path) -> None:
    """The record of the export says which label and rate the threshold is for, and that there is one."""

    def relax(data: Any) -> None:
        data["classifier"]["calibration"]["onnx"]["threshold"]["stated_fpr"] = 0.5

    def lose(data: Any) -> None:
        del data["classifier"]["calibration"]["onnx"]

    for number, (edit, words) in enumerate(
        ((relax, "0.5], expected ['program', 0.1]"), (lose, "is missing"))
    ):
        bad = altered(bundle, tmp_path / str(number), edit_manifest(edit))
        report = validate(bad, target="onnx")
        (check,) = (c for c in report.checks if c.verdict != "pass")
        assert check.name == "labels.calibration" and words in check.detail


def test_texts_of_another_calibration_are_refused(bundle: Bundle, tiny_bundle: Bundle) -> None:
    tune, other = halves(evaluation_texts())
    for texts in (other, replace(tune, rows=tune.rows[::-1])):
        with pytest.raises(UsageError, match="does not hold the texts that temperature and threshold"):
            validate(bundle, target="onnx", tune=texts)
    with pytest.raises(UsageError, match="has no threshold"):
        validate(tiny_bundle, tune=tune)


def test_a_group_that_got_worse(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """A rare group of eight is one text that the artifact answers otherwise than the full-precision model."""
    data = halves(evaluation_texts())[1]
    report = json.loads((bundle.path / "reports/validate-onnx.json").read_text())
    flips = report["labelled"]["worst_flips"]
    assert flips, "the tiny model answers one of 60 texts otherwise"
    changed = {row["row"] - 1 for row in flips}
    lost = replace(data.rows[flips[0]["row"] - 1], label=flips[0]["reference"], group="rare")
    same = (row for number, row in enumerate(data.rows) if number not in changed)
    worse = LabelledTexts("worse", (*same, *[lost] * 8))
    found = failures(bundle, checkpoint, labelled=worse, target="onnx")
    assert found["data.accuracy_worst_group"].startswith("rare of 3 groups")


def test_the_command_line(
    bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = jsonl(evaluation_texts(), tmp_path / "data.jsonl")
    place, reference = str(bundle.path), str(checkpoint.path)
    assert main(["classify", place, "--data", str(data), "--json", str(tmp_path / "out.json")]) == 0
    answers = json.loads((tmp_path / "out.json").read_text())["answers"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(answers) == len(evaluation_texts().rows)
    assert lines[0].startswith(answers[0]["answer"]["label"])
    limits = ["--max-kl", "1", "--tokens", "256"]
    command = ["validate", place, "-t", "xnnpack", "--reference", reference, "--data", str(data), *limits]
    files = [f"--{kind}={tmp_path / kind}" for kind in ("html", "markdown", "junit")]
    assert main([*command, "--max-flips", "0", *files]) in (1, 3)
    assert "data.flips" in capsys.readouterr().out
    for name in ("html", "markdown", "junit"):
        assert "data.flips" in (tmp_path / name).read_text()
    assert main(["run", place, "-p", "Once"]) == 2
    assert main(["challenge", place, "-o", str(tmp_path / "c.json")]) == 2
    assert main([*command, "--max-ppl-ratio", "2"]) == 2
    assert main(["validate", place, "--data", str(data)]) == 2
    errors = capsys.readouterr().err
    assert "predicts no next token" in errors and "no perplexity" in errors and "none was given" in errors
    plan = ["export", reference, "--task", "classify", "--plan"]
    assert main([*plan, "-t", "mlx"]) == 2 and main(plan) == 0
    output = ["-o", str(tmp_path / "new")]
    for arguments, words in (
        ([reference], "Add --task classify"),
        ([reference, "--task", "classify", "-t", "gguf"], "as wide as the vocabulary"),
        ([reference, "--task", "classify", "-r", "int4-best"], "text that the model writes"),
        ([reference, "--task", "classify", "--tune", str(data), "--data", str(data)], "both hold the text"),
        ([reference, "--data", str(data)], "is for a classifier"),
        ([reference, "--task", "classify", "--max-flips", "0.1"], "given without them"),
    ):
        assert main(["export", *arguments, *output]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_generates_text_has_no_labels(tiny_bundle: Bundle, tmp_path: Path) -> None:
    data = jsonl(evaluation_texts(), tmp_path / "data.jsonl")
    assert main(["classify", str(tiny_bundle.path), "-p", "x"]) == 2
    assert main(["validate", str(tiny_bundle.path), "--data", str(data)]) == 2
    with load(tiny_bundle) as runtime, pytest.raises(UsageError, match="has no labels"):
        runtime.classify("x")
