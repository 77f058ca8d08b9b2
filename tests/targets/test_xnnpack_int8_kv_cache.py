"""int8 KV cache: numerics, memory, structure of the file, and targets without it."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from edgellama.checkpoints import Checkpoint
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.errors import RecipeError
from edgellama.export.forecast import forecast_artifact
from edgellama.export.plan import make_plan
from edgellama.gate import parity
from edgellama.gate.limits import parity_limit
from edgellama.model.activations import int8_per_head
from edgellama.recipe import RECIPES, Recipe
from edgellama.runtimes.xnnpack import PteRuntime
from edgellama.targets import TARGETS
from edgellama.targets.xnnpack.describe import describe_artifact
from edgellama.targets.xnnpack.structure import check_structure
from edgellama.text.windows import default_texts, windows
from tests.helpers.tiny_models import CONTEXT, Cut, lower, provenance

pytestmark = pytest.mark.slow

INT8 = replace(RECIPES["int4-fast"], name="int8-cache", kv_cache="int8")


@pytest.fixture(scope="module")
def int8_cache_cut(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    """Two layers with an int8 KV cache."""
    return lower(tiny_checkpoint.first_layers(2), INT8, tmp_path_factory.mktemp("kv") / "model.pte")


def test_the_rounding_is_that_of_the_operator() -> None:
    """Codes, scale and zero point equal those of quantized_decomposed, for ordinary and for odd rows."""
    ops = torch.ops.quantized_decomposed
    rows = torch.randn(64, 3, 16, generator=torch.Generator().manual_seed(0))
    rows[0], rows[1], rows[2] = 0.0, rows[1].abs(), 1e-9
    scales, zeros = ops.choose_qparams_per_token_asymmetric(rows, torch.int8)
    codes = ops.quantize_per_token(rows, scales, zeros, -128, 127, torch.int8)
    expected = (codes.float() - zeros.float()) * scales.float()
    assert torch.equal(int8_per_head(rows), expected)


def test_the_artifact_matches_the_emulation(int8_cache_cut: Cut) -> None:
    """As close as with a float cache in tests/export/test_lower_xnnpack.py. A float emulation is far off."""
    scored = list(islice(windows(default_texts(), int8_cache_cut.checkpoint.tokenizer, CONTEXT), 6))
    close: list[float] = []
    first: list[float] = []
    far: list[float] = []
    floors: list[float] = []
    with PteRuntime(int8_cache_cut.path) as runtime:
        for window in scored:
            logits = parity.steps(runtime, window.tokens)
            for recipe, kl_means in (
                (int8_cache_cut.recipe, close),
                (replace(int8_cache_cut.recipe, kv_cache="float"), far),
            ):
                expected = replace(int8_cache_cut, recipe=recipe).exact_reference
                measured, floor = parity.measure_parity(logits, expected, window)
                kl_means.append(measured.kl.mean())
                if kl_means is close:
                    first.append(measured.kl[:8].mean())
                    floors.append(floor.kl.mean())
            runtime.reset()
            assert np.abs(runtime.forward(window.tokens) - logits[-1].numpy()).max() < 0.5  # prefill = decode
    # A rounding that flips spreads through the rest of its window. The windows depend on the processor.
    assert sorted(close)[1] <= 1e-10 and np.median(close) <= 1e-5 and np.median(first) <= 1e-10
    assert np.mean(close) <= parity_limit(float(np.mean(floors))) < np.mean(far)


def test_structure_and_memory_of_the_int8_cache(int8_cache_cut: Cut) -> None:
    assert [
        c
        for c in check_structure(int8_cache_cut.path, int8_cache_cut.model, provenance(INT8))
        if c.verdict != "pass"
    ] == []
    config = int8_cache_cut.checkpoint.config
    memory = describe_artifact(int8_cache_cut.path, int8_cache_cut.model)["memory"]
    assert memory["kv_cache"] == 2 * 2 * CONTEXT * config.num_key_value_heads * (config.head_dim + 5)
    assert forecast_artifact(config, INT8, TARGETS["xnnpack"], CONTEXT).memory.kv_cache == memory["kv_cache"]


def test_a_recipe_for_the_other_cache_is_a_fault(
    int8_cache_cut: Cut, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Finds a float cache under an int8 recipe, and the reverse, by name."""
    float_cache_cut = lower(tiny_checkpoint.first_layers(2), RECIPES["int4-fast"], tmp_path / "model.pte")
    for cut, recipe in ((int8_cache_cut, RECIPES["int4-fast"]), (float_cache_cut, INT8)):
        failures = {
            c.name: c.detail
            for c in check_structure(cut.path, cut.model, provenance(recipe))
            if c.verdict != "pass"
        }
        assert "sdpa" in failures.pop("structure.operators") and not failures


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"xnnpack"}))
def test_targets_without_it_refuse_it(name: str, tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(RecipeError, match=f"target '{name}' has no kv_cache 'int8'"):
        make_plan(tiny_checkpoint, INT8, [TARGETS["xnnpack"], TARGETS[name]], CONTEXT)


def test_a_recipe_names_a_cache_that_exists() -> None:
    with pytest.raises(RecipeError, match="unknown kv_cache 'int4'"):
        replace(INT8, kv_cache="int4")
    assert Recipe.from_dict(INT8.to_dict()) == INT8


def test_a_bundle_passes_the_gate(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = export(tiny_checkpoint, tmp_path / "m.edgellama", recipe=INT8, context=CONTEXT)
    report = validate(bundle, reference=tiny_checkpoint, tokens=1024)
    assert report.passed, report.to_text()
    assert bundle.manifest["recipe"]["kv_cache"] == "int8"
