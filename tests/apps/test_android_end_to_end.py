"""End-to-end tests of the Kotlin core: its tokenizer, loop and golden check, with the .pte in a Python process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, write_manifest
from edgellama.bundle.golden import read_golden
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.commands.classify_task import ClassifyTask
from edgellama.commands.export import export
from edgellama.gate.device import judge, read_device_logs
from edgellama.model.llama import RMSNorm
from edgellama.runtimes.generate import Speed, stream
from edgellama.runtimes.load import load
from edgellama.runtimes.sampler import Sampler
from edgellama.targets.xnnpack.numerics import norm_weight
from edgellama.text.label_prompt import prompt_ids
from tests.helpers.android_build import Core
from tests.helpers.demo import Demo
from tests.helpers.paths import ROOT
from tests.helpers.tiny_classifier import CONTEXT, evaluation_texts, halves, open_classifier
from tests.helpers.tiny_guard import CONTEXT as GUARD_CONTEXT
from tests.helpers.tiny_guard import judged_texts, write_guard

pytestmark = pytest.mark.slow

PROMPTS = (
    "The capital of France is",
    "In 1815, we'll see that 3.14159 and 1,000,000 naïve cafés — “quotes” 🙂 你好\r\n\n",
    "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
)
TOKENS = 24


def run_core(core: Core, bundle: Path, tmp_path: Path, prompts: tuple[str, ...] = PROMPTS) -> dict[str, Any]:
    """Results of the Kotlin class EndToEnd: token ids, answers and the log of the golden check."""
    prompts_file, out = tmp_path / "prompts.json", tmp_path / "out.json"
    prompts_file.write_text(json.dumps(prompts))
    model = str(bundle / "xnnpack/model.pte")
    server = [sys.executable, "-W", "ignore", "-m", "tests.helpers.logits_server", model]
    command = ["java", "-cp", core.classpath, "edgellama.core.EndToEnd", str(bundle), str(out), str(TOKENS)]
    done = subprocess.run(
        [*command, str(prompts_file), *server],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def damage_a_tensor(bundle: Path, checkpoint: Checkpoint) -> None:
    """Doubles the weight of one norm in one layer."""
    file = bundle / "xnnpack/model.pte"
    norm = RMSNorm(checkpoint.config.hidden_size, checkpoint.config.rms_norm_eps)
    last = checkpoint.config.num_hidden_layers - 1
    norm.weight = nn.Parameter(
        checkpoint.tensor(f"model.layers.{min(last, 1)}.post_attention_layernorm.weight")
    )
    weight = norm_weight(norm).detach().numpy()
    content = file.read_bytes()
    start = content.find(weight.tobytes())
    assert start >= 0 and content.count(weight.tobytes()) == 1
    file.write_bytes(content[:start] + (2 * weight).tobytes() + content[start + weight.nbytes :])


def swap_the_tokenizer(bundle: Path, checkpoint: Checkpoint) -> None:
    """Drops the second half of the merges. The tokenizer still loads, but encodes many words differently."""
    file = bundle / "tokenizer/tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    merges = data["model"]["merges"]
    data["model"]["merges"] = merges[: len(merges) // 2]
    file.write_text(json.dumps(data), encoding="utf-8")


DAMAGES: dict[str, tuple[Callable[[Path, Checkpoint], None], set[str]]] = {
    "tensor": (damage_a_tensor, {"artifact", "parity_kl", "parity_kl_sequence"}),
    "tokenizer": (swap_the_tokenizer, {"tokenizer"}),
}


def failed_checks(log: dict[str, Any]) -> set[str]:
    return {c["name"] for c in log["checks"] if c["verdict"] != "pass"}


def damaged(bundle: Bundle, checkpoint: Checkpoint, damage: str, tmp_path: Path) -> Path:
    """A copy with one kind of damage and correct hashes in the manifest, so that only a run detects it."""
    path = tmp_path / "damaged.edgellama"
    shutil.copytree(bundle.path, path)
    damage_bundle, _ = DAMAGES[damage]
    damage_bundle(path, checkpoint)
    write_manifest(path, json.loads((path / MANIFEST).read_text(encoding="utf-8")))
    return path


def answers_of(bundle: Bundle) -> list[str]:
    """Greedy answers to PROMPTS, as `edgellama run` prints them."""
    answers = []
    with load(bundle) as runtime:
        for prompt in PROMPTS:
            runtime.reset()
            tokens = bundle.tokenizer.encode(prompt)
            stop = bundle.config.eos_token_ids
            pieces = stream(runtime, bundle.tokenizer, tokens, Sampler(), TOKENS, stop, Speed())
            answers.append("".join(pieces).removesuffix(" [stopped at --max-tokens]"))
    return answers


def check_sound_bundle(core: Core, bundle: Bundle, tmp_path: Path) -> None:
    results = run_core(core, bundle.path, tmp_path)
    assert results["ids"] == [bundle.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert results["answers"] == answers_of(bundle)
    check_log(results["log"], bundle, tmp_path)


def check_log(log: dict[str, Any], bundle: Bundle, tmp_path: Path) -> None:
    """The device log of a sound bundle, which the host accepts."""
    assert failed_checks(log) == set() and log["verdict"] == "pass"
    print(
        f"Kotlin over ExecuTorch: KL {log['parity_kl_mean']:.1e} from the host, {log['kl_mean']:.3f} from the reference"
    )
    assert log["parity_kl_mean"] < 1e-6 and log["parity_top1_agreement"] == 1.0, (
        "the same kernels on the same machine"
    )
    file = tmp_path / "device.json"
    file.write_text(json.dumps(log))
    (read,) = read_device_logs([file], bundle.targets)
    assert {c.verdict for c in judge(bundle, read_golden(bundle), read)} == {"pass"}


def test_the_tiny_model(android_core: Core, tiny_bundle: Bundle, tmp_path: Path) -> None:
    check_sound_bundle(android_core, tiny_bundle, tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_tiny_model_damaged(
    damage: str,
    android_core: Core,
    tiny_bundle: Bundle,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    path = damaged(tiny_bundle, tiny_checkpoint, damage, tmp_path)
    log = run_core(android_core, path, tmp_path, ())["log"]
    assert failed_checks(log) == DAMAGES[damage][1] and log["verdict"] == "fail"
    verdicts = {c.name: c.verdict for c in judge(tiny_bundle, read_golden(tiny_bundle), log)}
    assert {f"device.{name}" for name in failed_checks(log)} | {"device.verdict"} == {
        name for name, verdict in verdicts.items() if verdict == "fail"
    }


@pytest.fixture(scope="module")
def classifiers(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A calibrated classifier with a trained head, and a guard, both of the first layer of the tiny model."""
    tune = halves(evaluation_texts())[0]
    options: Any = {"recipe": "int4-fast", "validate": False}
    directory = tmp_path_factory.mktemp("classifiers")
    tasks = {
        "head": (
            open_classifier(tiny_checkpoint, directory / "head"),
            ClassifyTask(tune=tune, positive="program", fpr=0.1),
            CONTEXT,
        ),
        "guard": (
            open_checkpoint(write_guard(tiny_checkpoint, directory / "guard")),
            ClassifyTask(guard=True, tune=judged_texts(), positive="unsafe", fpr=0.2),
            GUARD_CONTEXT,
        ),
    }
    return {
        name: export(checkpoint, directory / f"{name}.edgellama", context=context, task=task, **options)
        for name, (checkpoint, task, context) in tasks.items()
    }


@pytest.mark.parametrize("name", ["head", "guard"])
def test_a_classifier(name: str, android_core: Core, classifiers: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = classifiers[name]
    texts = (*(row.text for row in evaluation_texts().rows[::6]), "<|im_end|> naïve 🙂", PROMPTS[2])
    results = run_core(android_core, bundle.path, tmp_path, texts)
    classifier = bundle.classifier
    assert classifier is not None
    assert results["ids"] == [
        prompt_ids(classifier, bundle.tokenizer, text, bundle.context_length) for text in texts
    ]
    with load(bundle) as runtime:
        expected = [json.loads(json.dumps(runtime.classify(text).to_dict())) for text in texts]
    for found, answer in zip(results["answers"], expected, strict=True):
        assert found.pop("probabilities") == pytest.approx(answer.pop("probabilities"), abs=1e-9)
        assert found == answer
    assert {answer["flagged"] for answer in expected} == {True, False}
    if name == "guard":
        assert {len(answer["categories"]) for answer in expected} > {0}
    else:
        assert len({answer["label"] for answer in expected}) > 1
    check_log(results["log"], bundle, tmp_path)


def test_a_classifier_with_a_damaged_tensor(
    android_core: Core, classifiers: dict[str, Bundle], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    bundle = classifiers["head"]
    path = damaged(bundle, tiny_checkpoint.first_layers(1), "tensor", tmp_path)
    log = run_core(android_core, path, tmp_path, ())["log"]
    assert failed_checks(log) == {"artifact", "parity_kl", "parity_kl_sequence"} and log["verdict"] == "fail"
    failed = {c.name for c in judge(bundle, read_golden(bundle), log) if c.verdict == "fail"}
    assert failed == {f"device.{name}" for name in failed_checks(log)} | {"device.verdict"}


def test_smollm2(android_core: Core, demo: Demo, tmp_path: Path) -> None:
    check_sound_bundle(android_core, demo.bundle, tmp_path)


def test_smollm2_with_a_damaged_tensor(android_core: Core, demo: Demo, gguf: Path, tmp_path: Path) -> None:
    path = damaged(demo.bundle, open_checkpoint(gguf), "tensor", tmp_path)
    log = run_core(android_core, path, tmp_path, ())["log"]
    assert failed_checks(log) == DAMAGES["tensor"][1] and log["verdict"] == "fail"
    print(f"a tensor damaged: KL {log['parity_kl_mean']:.2f} from the host's run")
