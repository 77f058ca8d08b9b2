"""Tests of the main task on a real model: SmolLM2-135M-Instruct, as a new user exports and runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import edgellama
from edgellama.checkpoints import Checkpoint
from edgellama.export.coreml.lower import lower_to_coreml, write_package
from edgellama.export.lower import write_client_files
from edgellama.export.onnx.lower import lower_to_onnx
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.xnnpack.lower import lower_to_xnnpack
from edgellama.formats.mlpackage import read_mlpackage
from edgellama.formats.onnx_model import read_onnx
from edgellama.gate import parity
from edgellama.gate.limits import ALWAYS_PASSES
from edgellama.gate.metrics import compare, kl_divergence
from edgellama.gate.references import QuantizedReference
from edgellama.host.progress import Progress
from edgellama.recipe import RECIPES
from edgellama.runtimes.coreml import open_coreml
from edgellama.runtimes.generate import Speed, stream
from edgellama.runtimes.load import load
from edgellama.runtimes.onnx import OrtRuntime
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.runtimes.sampler import Sampler
from edgellama.runtimes.xnnpack import PteRuntime
from edgellama.targets import TARGETS
from edgellama.targets.coreml import structure as coreml_structure
from edgellama.targets.coreml.interface import PROFILES
from edgellama.targets.coreml.numerics import coreml_numerics
from edgellama.targets.onnx import structure as onnx_structure
from edgellama.targets.sizes import planned_bytes
from edgellama.targets.xnnpack import structure as xnnpack_structure
from edgellama.targets.xnnpack.numerics import xnnpack_numerics
from edgellama.text.windows import default_texts, windows
from tests.helpers.demo import Demo
from tests.helpers.paths import ROOT
from tests.helpers.tiny_models import provenance

pytestmark = pytest.mark.slow

PROMPTS = (
    "The",
    "Once upon a time there was",
    "def fibonacci(n):\n    ",
    "In 1815 the Congress of Vienna redrew the map of Europe, and",
    "Q: A farmer has 17 sheep, buys 25 more and sells 9. How many sheep does he have now? Let us think step by step.\nA:",
)
TOKENS, NOTE = 48, " [stopped at --max-tokens]"


@pytest.fixture(scope="module")
def checkpoint(gguf: Path) -> Checkpoint:
    return edgellama.open_checkpoint(gguf)


def test_demo_prints_sizes_accuracy_and_an_answer(demo: Demo) -> None:
    for word in ("artifact", "KL", "top-1", "perplexity", "prefill", "decode", "verdict     pass"):
        assert word in demo.output
    answer = demo.output.partition("known for?\n")[2].partition("\n\nprefill")[0]
    # int4-fast is too coarse for a promise about the rest of the answer.
    assert "capital of France" in answer


def test_export_and_gate_use_at_most_three_gigabytes(demo: Demo) -> None:
    """The gate scores 4,096 tokens. Only the metrics of a window are kept, so more text needs no more memory."""
    assert demo.peak_bytes < 3e9


def test_report_in_the_bundle(demo: Demo) -> None:
    report = json.loads((demo.bundle.path / "reports/validate-xnnpack.json").read_text())
    assert report["tokens"] == 4096
    assert report["verdict"] == "pass"
    assert report["parity"]["kl_mean"] <= 3 * report["parity"]["noise_floor_kl"]
    low, high = report["quality"]["kl_mean_ci95"]
    # KL of int4 RTN without calibration on this model. Far less would mean that no layer was quantized.
    assert 0.2 < low < high < 0.45
    assert set(report["domains"]) == {"evaluation_persuasion", "evaluation_python_tutorial"}
    assert demo.bundle.manifest["accuracy"]["xnnpack"]["kl_mean"] == report["quality"]["kl_mean"]


def test_sizes_are_as_planned(demo: Demo) -> None:
    (artifact,) = demo.bundle.manifest["artifacts"]
    tensors = json.loads((demo.bundle.path / "reports/export.json").read_text())["tensors"]
    planned = sum(row["bytes"] for row in tensors)
    assert artifact["bytes"] == pytest.approx(planned, rel=0.02)
    assert sum(1 for row in tensors if row["scheme"] == "int4 g32 a8") == 210
    assert not demo.bundle.problems()


def test_the_runner_of_executorch_gives_the_same_answers(demo: Demo, tmp_path: Path) -> None:
    """TextLLMRunner on the .pte and tokenizer.json equals `edgellama run`: greedy, five prompts."""
    script = (
        "import json, sys\n"
        "from edgellama.host import executorch_libraries\n"
        "from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner\n"
        "pte, tokenizer, out, count, *prompts = sys.argv[1:]\n"
        "answers = []\n"
        "for prompt in prompts:\n"
        "    runner, pieces = TextLLMRunner(pte, tokenizer), []\n"
        "    runner.generate(prompt, GenerationConfig(echo=False, max_new_tokens=int(count), temperature=0.0), pieces.append)\n"
        "    answers.append(''.join(pieces))\n"
        "json.dump(answers, open(out, 'w'))\n"
    )
    bundle, out = demo.bundle, tmp_path / "answers.json"
    pte, tokenizer = bundle.artifact("xnnpack"), bundle.path / "tokenizer" / "tokenizer.json"
    arguments = [str(pte), str(tokenizer), str(out), str(TOKENS), *PROMPTS]
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    runner_answers = json.loads(out.read_text())
    printed = subprocess.run(
        [sys.executable, "-m", "edgellama", "run", str(bundle.path), "-p", PROMPTS[0], "-n", str(TOKENS)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert printed.removesuffix("\n").removesuffix(NOTE) == runner_answers[0]
    sampler, stop = Sampler(), bundle.config.eos_token_ids
    with load(bundle, "xnnpack") as runtime:
        for prompt, answer in zip(PROMPTS, runner_answers, strict=True):
            runtime.reset()
            tokens = bundle.tokenizer.encode(prompt)
            pieces = stream(runtime, bundle.tokenizer, tokens, sampler, TOKENS, stop, Speed())
            assert "".join(pieces).removesuffix(NOTE) == answer


@pytest.mark.parametrize("layers", [1, 2])
def test_parity_of_shallow_cuts(checkpoint: Checkpoint, layers: int, tmp_path: Path) -> None:
    """Shallow models do not amplify errors, so the limits for errors of lowering are strict."""
    cut = checkpoint.first_layers(layers)
    recipe = RECIPES["int4-fast"]
    model, _ = quantized_llama(cut, recipe, 64)
    path = tmp_path / "model.pte"
    lower_to_xnnpack(model, path, provenance(recipe), progress=Progress())
    checks = xnnpack_structure.check_structure(path, model, provenance(recipe))
    assert [c.name for c in checks if c.verdict != "pass"] == []
    runtime, kl = PteRuntime(path), []
    for window in islice(windows(default_texts(), cut.tokenizer, 24), 4):
        artifact = parity.steps(runtime, window.tokens)
        with xnnpack_numerics(model):
            quantized = parity.steps(ReferenceRuntime(model), window.tokens)
        kl.append(kl_divergence(quantized, artifact))
    print(f"{layers} layers: mean KL by window {[f'{w.mean():.1e}' for w in kl]}")
    assert np.mean(kl) <= 1e-5
    assert max(w[: parity.FIRST].mean() for w in kl) <= ALWAYS_PASSES


def test_inspect_names_the_model(demo: Demo) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgellama", "inspect", str(demo.bundle.path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "int4" in done.stdout and "134" in done.stdout


def test_onnx_in_both_forms(checkpoint: Checkpoint, demo: Demo, tmp_path: Path) -> None:
    """Checks planned sizes, logits of the quantized model, agreement with the .pte, and greedy text of genai."""
    import onnxruntime_genai as og

    window = next(windows(default_texts(), checkpoint.tokenizer, 64))
    for form in ("ort", "portable"):
        recipe, path = replace(RECIPES["int4-fast"], onnx_form=form), tmp_path / form
        model, _ = quantized_llama(checkpoint, recipe, 2048)
        lower_to_onnx(model, path, provenance(recipe), progress=Progress())
        write_client_files(TARGETS["onnx"], checkpoint, model, path, provenance(recipe))
        checks = onnx_structure.check_structure(path, model, provenance(recipe))
        assert [c for c in checks if c.verdict != "pass"] == []
        planned = planned_bytes(model.config, recipe, TARGETS["onnx"].storage, 2048)
        assert 1 <= read_onnx(path).bytes / planned <= 1.03
        with OrtRuntime(path) as runtime:
            logits = parity.steps(runtime, window.tokens)
            expected = QuantizedReference(model, recipe, TARGETS["onnx"])
            measured, floor = parity.measure_parity(logits, expected, window)
            print(f"{form}: KL {measured.kl.mean():.1e}, noise floor {floor.kl.mean():.1e}")
            # The noise floor of one window is itself a sample, hence the factor of 10. The gate averages four.
            assert measured.kl.mean() <= (max(1e-3, 10 * floor.kl.mean()) if form == "ort" else 1e-6)
            # Some thirty positions have no tie, and one flipped token is three percent of them.
            assert parity.top1_without_ties([measured]) >= 0.9
            xnnpack = parity.steps(PteRuntime(demo.bundle.artifact("xnnpack")), window.tokens)
            assert kl_divergence(xnnpack, logits).mean() <= 0.06
            ids = checkpoint.tokenizer.encode(PROMPTS[1])
            runtime.reset()
            greedy, next_logits = [], runtime.forward(ids)
            for _ in range(TOKENS):
                greedy.append(int(next_logits.argmax()))
                next_logits = runtime.forward(greedy[-1:])
        genai = og.Model(str(path))
        parameters = og.GeneratorParams(genai)
        parameters.set_search_options(max_length=len(ids) + TOKENS)
        generator = og.Generator(genai, parameters)
        generator.append_tokens(list(og.Tokenizer(genai).encode(PROMPTS[1])))
        while not generator.is_done():
            generator.generate_next_token()
        sequence = [int(token) for token in generator.get_sequence(0)]
        assert sequence[len(ids) :] == greedy[: len(sequence) - len(ids)] and len(sequence) > len(ids)


def test_core_ml_packages(checkpoint: Checkpoint, demo: Demo, tmp_path: Path) -> None:
    """Checks both profiles: planned sizes, weights stored once, and logits of the quantized model."""
    window = next(windows(default_texts(), checkpoint.tokenizer, 256))
    for recipe in (RECIPES["int4-fast"], RECIPES["int8-ane"]):
        model, _ = quantized_llama(checkpoint, recipe, 2048)
        path = tmp_path / f"{recipe.coreml_profile}.mlpackage"
        lower_to_coreml(model, path, provenance(recipe), progress=Progress())
        checks = coreml_structure.check_structure(path, model, provenance(recipe))
        assert [c for c in checks if c.verdict != "pass"] == []
        size = read_mlpackage(path).bytes
        planned = planned_bytes(model.config, recipe, TARGETS["coreml"].storage, 2048)
        assert 1 <= size / planned <= 1.03
        runtime = open_coreml(path)
        logits = runtime.forward_all(window.tokens)
        with coreml_numerics(model):
            reference = ReferenceRuntime(model).forward_all(window.tokens)
        compared = compare(reference, logits, window.targets)
        assert compared.kl.mean() < 1e-4
        assert parity.top1_without_ties([compared]) >= 0.99
        if recipe.coreml_profile == "gpu":
            xnnpack = parity.steps(PteRuntime(demo.bundle.artifact("xnnpack")), window.tokens)
            assert kl_divergence(xnnpack, logits).mean() <= 0.04
        else:
            decode = tmp_path / "decode.mlpackage"
            forms = {"decode": PROFILES["ane"]["decode"]}
            write_package(model, forms, decode, provenance(recipe), progress=Progress())
            assert size <= 1.03 * read_mlpackage(decode).bytes
