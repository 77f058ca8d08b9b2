"""Target `gguf`: llama.cpp on the file computes what the quantized model does, and the file holds its codes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from edgellama.bundle.restore import quantized_modules
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.errors import BundleError, LoweringError, MissingDependencyError, RecipeError
from edgellama.export.gguf.lower import lower_to_gguf
from edgellama.export.lower import lowering_for
from edgellama.export.plan import make_plan
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.formats.gguf_blocks import pack, unpack
from edgellama.gate.metrics import kl_divergence
from edgellama.gate.parity import steps
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.model.quantized import apply_codes, codes_of
from edgellama.recipe import RECIPES, PerChannel, PerGroup, Recipe, Rule, Scheme
from edgellama.runtimes import llama_cpp, llama_structs
from edgellama.runtimes.gguf import GgufParts, GgufRuntime
from edgellama.runtimes.load import opener_for
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.targets import TARGETS
from edgellama.targets.gguf.numerics import gguf_numerics, q8_0
from edgellama.targets.gguf.structure import check_structure, stored_codes
from tests.helpers.tiny_models import CONTEXT, provenance, random_checkpoint

TOKENS = [(37 * i + 11) % 512 for i in range(CONTEXT)]
SHORT = TOKENS[:24]
FAST = RECIPES["int4-fast"]
EMBEDDING = Scheme(8, PerChannel(), int8_activations=False)


def lowered(checkpoint: Checkpoint, recipe: Recipe, path: Path, context: int = CONTEXT) -> Llama:
    """Lowers the checkpoint to the file `path`, with its tokenizer, and returns the quantized model."""
    model, _ = quantized_llama(checkpoint, recipe, context)
    lower_to_gguf(model, path, provenance(recipe), tokenizer=checkpoint.tokenizer, progress=Progress())
    return model


def reference(model: Llama, tokens: list[int]) -> Tensor:
    """Logits [T, vocab_size] of the quantized model with the target's numerics."""
    with gguf_numerics(model):
        return ReferenceRuntime(model).forward_all(tokens)


def unexpected(path: Path, model: Llama, recipe: Recipe) -> list[str]:
    checks = check_structure(path, model, provenance(recipe))
    return [f"{c.name}: {c.detail}" for c in checks if c.verdict != "pass"]


def of_groups(size: int) -> Recipe:
    linears = Scheme(4, PerGroup(size), int8_activations=True)
    rules = (Rule("model.embed_tokens", EMBEDDING), Rule("lm_head", None), Rule("*", linears))
    return replace(FAST, name="groups", rules=rules)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "int8": (RECIPES["int8"], {}),
    "floats": (RECIPES["fp32"], {}),
    "biases, own head": (FAST, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "groups of 64, llama3 RoPE": (of_groups(64), {"intermediate_size": 128, "rope_scaling": LLAMA3}),
    "groups of 128, linear RoPE": (
        of_groups(128),
        {
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_attention_heads": 8,
            "rope_scaling": {"type": "linear", "factor": 4.0},
        },
    ),
    "wide heads": (FAST, {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 4}),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_layer_of_any_kind(name: str, tmp_path: Path) -> None:
    recipe, changes = MODELS[name]
    checkpoint = random_checkpoint(tmp_path / "model", changes)
    model = lowered(checkpoint, recipe, tmp_path / "model.gguf")
    assert unexpected(tmp_path / "model.gguf", model, recipe) == []
    stored = list(stored_codes(tmp_path / "model.gguf"))
    for _, codes in quantized_modules(model):
        assert any(
            torch.equal(values, codes.values) and torch.equal(scales, codes.scales)
            for values, scales in stored
        )
    with GgufRuntime(tmp_path / "model.gguf") as runtime:
        actual = steps(runtime, SHORT)
    kl = kl_divergence(reference(model, SHORT), actual)
    print(f"{name}: mean KL {kl.mean():.1e}, largest {kl.max():.1e}")
    assert np.median(kl) < 1e-9 and kl.mean() < 1e-5


def test_prompts_of_any_length_at_any_position(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    lowered(tiny_checkpoint.first_layers(1), RECIPES["fp32"], path)
    with GgufRuntime(path) as runtime:
        expected = runtime.forward_all(TOKENS)
        for pieces in ((1,), (2, 31), (33, 5, 64), (CONTEXT,)):
            runtime.reset()
            position = 0
            while position < CONTEXT:
                count = min(pieces[position % len(pieces)], CONTEXT - position)
                actual = torch.from_numpy(runtime.forward(TOKENS[position : position + count]))
                position += count
                torch.testing.assert_close(actual, expected[position - 1], rtol=1e-3, atol=1e-3)


def test_the_form_of_devices_differs_by_rounding_only(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    lowered(tiny_checkpoint.first_layers(1), FAST, path)
    rows = []
    for repacked in (False, True):
        with GgufRuntime(path, threads=1, repacked=repacked) as runtime:
            rows.append(runtime.forward_all(TOKENS))
    kl = kl_divergence(*rows)
    assert not torch.equal(*rows) and np.median(kl) < 1e-5


def test_layers_are_seen_one_by_one(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = lowered(tiny_checkpoint.first_layers(2), FAST, path)
    runtime = GgufParts(path, 2)
    states = runtime.states(SHORT[:5])
    runtime.close()
    embedded = model.model.embed_tokens(torch.tensor(SHORT[:5]))
    assert torch.equal(states.inputs[0], embedded)
    with gguf_numerics(model):
        after = model.model.layers[0](embedded[None], *_tables(model, 5), 0)[0]
    torch.testing.assert_close(states.inputs[1], after, rtol=1e-3, atol=1e-3)


def _tables(model: Llama, count: int) -> tuple[Tensor, Tensor]:
    return model.model.cos[:count], model.model.sin[:count]


def test_the_same_bytes_twice_and_the_codes_come_back(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    one_layer = tiny_checkpoint.first_layers(1)
    paths = [tmp_path / "one.gguf", tmp_path / "two.gguf"]
    model, _ = (lowered(one_layer, FAST, path) for path in paths)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    stored = list(stored_codes(paths[0]))
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        codes = codes_of(model.get_submodule(f"model.layers.0.{name}"))
        assert codes is not None
        assert any(torch.equal(v, codes.values) and torch.equal(s, codes.scales) for v, s in stored)


def test_the_file_is_a_checkpoint_of_the_dequantized_weights(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """edgellama's own reader, and with it its constants and tokenizer, takes the file as any other GGUF."""
    path = tmp_path / "model.gguf"
    model = lowered(tiny_checkpoint.first_layers(1), FAST, path)
    opened = open_checkpoint(path)
    assert opened.config == model.config
    assert opened.tokenizer.encode("It's 12345 <|im_end|>") == tiny_checkpoint.tokenizer.encode(
        "It's 12345 <|im_end|>"
    )
    read = load_llama(opened, CONTEXT)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        codes = codes_of(model.get_submodule(f"model.layers.0.{name}"))
        assert codes is not None
        weight = read.get_parameter(f"model.layers.0.{name}.weight")
        assert torch.equal(weight, codes.dequantize())


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_blocks_are_ggml_s(kind: str) -> None:
    generator = np.random.default_rng(0)
    low, high = (-8, 8) if kind == "Q4_0" else (-128, 128)
    values = generator.integers(low, high, (5, 96)).astype(np.int8)
    scales = generator.random((5, 3)).astype(np.float16)
    raw = pack(kind, values, scales)
    expected = (values.reshape(5, 3, 32) * scales.astype(np.float32)[..., None]).reshape(5, 96)
    assert np.array_equal(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]), expected)
    back = unpack(kind, raw, (5, 96))
    assert np.array_equal(back[0], values) and np.array_equal(back[1], scales)


def test_activations_are_rounded_as_ggml_does() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    raw = gguf.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)
    theirs = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType.Q8_0))
    # gguf-py rounds halves away from zero, and 1 / (absmax / 127) where ggml has 127 / absmax.
    assert (theirs == q8_0(x)).float().mean() > 0.999


def test_a_scale_that_float16_does_not_hold_is_refused_by_name(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model, _ = quantized_llama(tiny_checkpoint.first_layers(1), FAST, CONTEXT)
    name = "model.layers.0.mlp.up_proj"
    codes = codes_of(model.get_submodule(name))
    assert codes is not None
    scales = codes.scales.clone()
    scales[0, 0] = 2.0**-20 * 1.0078125  # a bfloat16 number with 8 significant bits
    apply_codes(model, name, replace(codes, scales=scales))
    with pytest.raises(LoweringError, match=f"scales of {name} are no float16 numbers"):
        lower_to_gguf(model, tmp_path / "model.gguf", provenance(FAST), progress=Progress())


def test_rows_that_are_no_blocks_are_refused_before_the_slow_part(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "model", {"intermediate_size": 80})
    with pytest.raises(RecipeError, match=r"blocks of 32, and model.layers.0.mlp.down_proj has rows of 80"):
        make_plan(checkpoint, RECIPES["int8"], [TARGETS["gguf"]], 16)


@pytest.mark.parametrize("module", ["runtime", "damaged", "other version"])
def test_what_cannot_run_is_named(
    module: str, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if module == "damaged":
        (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\3\0\0\0" * 8)
        with pytest.raises(BundleError, match="cannot load it"):
            GgufRuntime(tmp_path / "model.gguf")
        return
    llama_cpp.library.cache_clear()
    if module == "runtime":
        monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
        expected = r"needs the package 'xllamacpp'.*edgellama\[gguf\]"
    else:
        monkeypatch.setitem(llama_structs.CONTEXT_DEFAULTS, "n_batch", 4096)
        expected = "n_batch is 2048, expected 4096"
    with pytest.raises(MissingDependencyError) as caught, TARGETS["gguf"].needs_extra():
        opener_for(TARGETS["gguf"])(tmp_path / "model.gguf")
    assert re.search(expected, f"{caught.value.message} {caught.value.remedy}")
    llama_cpp.library.cache_clear()


def test_lowering_needs_no_runtime() -> None:
    assert callable(lowering_for(TARGETS["gguf"]))
