"""Runtime `mlx-cpu`: mlx-lm's Llama on edgellama's directory, against torch and against mlx-lm's own commands."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import edgellama
from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint
from edgellama.cli.dispatch import main
from edgellama.commands.export import export
from edgellama.errors import BundleError, ContextLengthError, MissingDependencyError, UsageError
from edgellama.export.mlx.lower import lower_to_mlx
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.gate.metrics import kl_divergence
from edgellama.gate.own_dtype import examine_own_dtype
from edgellama.gate.parity import steps
from edgellama.host.progress import Progress
from edgellama.model.config import RopeScaling
from edgellama.model.llama import Llama
from edgellama.recipe import RECIPES, Recipe
from edgellama.runtimes.load import open_parts, opener_for
from edgellama.runtimes.mlx import MlxRuntime
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.targets import TARGETS
from edgellama.targets.mlx.numerics import mlx_numerics
from edgellama.text.chat import ChatTemplate
from edgellama.text.probes import PROBES
from tests.helpers.tiny_models import CONTEXT, provenance

pytestmark = pytest.mark.slow

TOKENS = [(37 * i + 11) % 512 for i in range(CONTEXT)]
MLX = TARGETS["mlx"]


def lowered(checkpoint: Checkpoint, recipe: Recipe, path: Path) -> Llama:
    model, _ = quantized_llama(checkpoint, recipe, CONTEXT)
    lower_to_mlx(model, path, provenance(recipe), progress=Progress())
    return model


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two layers in a bundle for MLX."""
    output = tmp_path_factory.mktemp("mlx") / "tiny.edgellama"
    cut = tiny_checkpoint.first_layers(2)
    return export(cut, output, targets=["mlx"], recipe="int4-fast", context=CONTEXT, validate=False)


@pytest.mark.parametrize(
    ("name", "dtype", "scaling"),
    [
        ("int4-fast", "float16", None),
        ("int8", "bfloat16", RopeScaling("llama3", 8.0, 1.0, 4.0, 32)),
        ("fp32", "float16", RopeScaling("linear", 2.0)),
    ],
)
def test_logits_are_those_of_the_quantized_model(
    name: str, dtype: str, scaling: RopeScaling | None, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    recipe = replace(RECIPES[name], mlx_dtype=dtype)
    cut = tiny_checkpoint.first_layers(2)
    checkpoint = replace(cut, config=replace(cut.config, rope_scaling=scaling))
    model = lowered(checkpoint, recipe, tmp_path / "mlx")
    with mlx_numerics(model, recipe):
        expected = ReferenceRuntime(model).forward_all(TOKENS)
    with MlxRuntime(tmp_path / "mlx") as runtime:
        assert runtime.name == ("mlx-gpu" if sys.platform == "darwin" else "mlx-cpu")
        actual = runtime.forward_all(TOKENS)
        assert kl_divergence(expected, actual).max() < 1e-9
        for pieces in ((1, 31), (33, 5), (CONTEXT,)):
            runtime.reset()
            rows = [runtime.forward(TOKENS[start:end]) for start, end in spans(pieces)]
            ends = [end - 1 for _, end in spans(pieces)]
            assert kl_divergence(expected[ends], torch.from_numpy(np.stack(rows))).max() < 1e-9


def spans(pieces: Sequence[int]) -> list[tuple[int, int]]:
    bounds = [0]
    while bounds[-1] < CONTEXT:
        bounds.append(min(CONTEXT, bounds[-1] + pieces[(len(bounds) - 1) % len(pieces)]))
    return list(pairwise(bounds))


def test_the_cache_and_its_end(bundle: Bundle) -> None:
    with edgellama.load(bundle) as runtime:
        first = steps(runtime, TOKENS[:8])
        runtime.forward(TOKENS[8:])
        assert runtime.position == runtime.context_length == CONTEXT
        with pytest.raises(ContextLengthError):
            runtime.forward([1])
        assert torch.equal(steps(runtime, TOKENS[:8]), first)
    with pytest.raises(UsageError, match="threads itself"):
        MlxRuntime(bundle.artifact("mlx"), threads=2)


def test_parts_return_the_input_of_every_layer(bundle: Bundle, tiny_checkpoint: Checkpoint) -> None:
    parts = open_parts(MLX, bundle.artifact("mlx"), bundle.config)
    states = parts.states(TOKENS[:6])
    with edgellama.load(bundle) as runtime:
        logits = torch.from_numpy(runtime.forward(TOKENS[:6]))
    assert [tuple(x.shape) for x in states.inputs] == [(6, bundle.config.hidden_size)] * 2
    assert torch.equal(states.logits, logits)
    parts.close()


def test_a_call_in_the_dtype_of_the_file(bundle: Bundle) -> None:
    (found,) = examine_own_dtype(MLX, bundle.artifact("mlx"), TOKENS).checks
    assert found.name == "parity.own_dtype" and found.verdict == "pass"
    assert isinstance(found.value, float) and 0 < found.value < 1e-4
    assert examine_own_dtype(TARGETS["onnx"], bundle.artifact("mlx"), TOKENS).checks == ()


def test_mlx_lm_generates_what_run_prints(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    """mlx-lm's own loader, tokenizer and greedy loop, cast to float32 as our runtime is.

    mlx-lm's detokenizer drops the space that a text begins with.
    """
    mlx_lm = importlib.import_module("mlx_lm")
    model, tokenizer = mlx_lm.load(str(bundle.artifact("mlx")))
    model.set_dtype(importlib.import_module("mlx.core").float32)
    for prompt in ("The quick", "Grüße: def f(x):\n\treturn", "<|im_start|>user\n2 + 2"):
        expected: str = mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=12)
        capsys.readouterr()
        assert main(["run", str(bundle.path), "-t", "mlx", "-p", prompt, "-n", "12"]) == 0
        printed = capsys.readouterr().out.removesuffix("\n").removesuffix(" [stopped at --max-tokens]")
        assert printed.removeprefix(" ") == expected and len(expected) > 12


def test_mlx_lms_tokenizer_gives_our_ids_and_stops_where_we_stop(bundle: Bundle) -> None:
    _, tokenizer = importlib.import_module("mlx_lm").load(str(bundle.artifact("mlx")), lazy=True)
    for text in PROBES:
        assert tokenizer.encode(text) == bundle.tokenizer.encode(text)
    assert tokenizer.eos_token_ids == set(bundle.config.eos_token_ids)
    messages = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    template = ChatTemplate.of(bundle.tokenizer)
    assert rendered == template.render(messages, add_generation_prompt=True)


def test_a_directory_that_mlx_lm_cannot_load(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "mlx"
    shutil.copytree(bundle.artifact("mlx"), copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(BundleError, match="mlx-lm cannot load it"):
        MlxRuntime(copy)
    (copy / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(BundleError, match="not readable as safetensors"):
        MlxRuntime(copy)


def test_a_missing_package_says_what_to_install(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export with the gate is refused before its slow part. Without the gate it needs no MLX."""
    for name in [n for n in sys.modules if n == "edgellama.runtimes.mlx" or n.startswith("mlx_lm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'edgellama\[mlx\]'"):
        opener_for(MLX)
    cut, output = tiny_checkpoint.first_layers(1), tmp_path / "m.edgellama"
    with pytest.raises(MissingDependencyError, match="needs the package 'mlx_lm"):
        export(cut, output, targets=["mlx"], recipe="int4-fast", context=CONTEXT)
    assert export(
        cut, output, targets=["mlx"], recipe="int4-fast", context=CONTEXT, validate=False
    ).targets == ["mlx"]


@pytest.mark.skipif(sys.platform != "darwin", reason="Metal runs on macOS only")
def test_the_gpu_of_a_mac_agrees_with_torch(bundle: Bundle, tiny_checkpoint: Checkpoint) -> None:
    model, _ = quantized_llama(tiny_checkpoint.first_layers(2), bundle.recipe, CONTEXT)
    with mlx_numerics(model, bundle.recipe):
        expected = ReferenceRuntime(model).forward_all(TOKENS)
    with edgellama.load(bundle) as runtime:
        assert runtime.name == "mlx-gpu"
        assert kl_divergence(expected, runtime.forward_all(TOKENS)).mean() < 1e-6
