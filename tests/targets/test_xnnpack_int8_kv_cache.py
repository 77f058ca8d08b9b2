"""The int8 KV cache: what it computes, what it costs, what the file says about it, and who refuses it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
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
from edgellama.targets.xnnpack.numerics import xnnpack_numerics
from edgellama.targets.xnnpack.structure import check_structure
from edgellama.text.windows import default_texts, windows
from tests.helpers.tiny_models import CONTEXT, Cut, lower, provenance

INT8 = replace(RECIPES["int4-fast"], kv_cache="int8")


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    return lower(tiny_checkpoint.first_layers(2), INT8, tmp_path_factory.mktemp("kv") / "model.pte")


def test_the_rounding_is_that_of_the_operator() -> None:
    """Codes, scale and zero point as quantized_decomposed computes them, for ordinary rows and for odd ones."""
    ops = torch.ops.quantized_decomposed
    rows = torch.randn(64, 3, 16, generator=torch.Generator().manual_seed(0))
    rows[0], rows[1], rows[2] = 0.0, rows[1].abs(), 1e-9
    scales, zeros = ops.choose_qparams_per_token_asymmetric(rows, torch.int8)
    codes = ops.quantize_per_token(rows, scales, zeros, -128, 127, torch.int8)
    expected = (codes.float() - zeros.float()) * scales.float()
    assert torch.equal(int8_per_head(rows), expected)


def test_the_artifact_computes_what_the_emulation_does(made: Cut) -> None:
    """As close as with a float cache (tests/export/test_lower_xnnpack.py), and closer than the float model by far."""
    scored = list(islice(windows(default_texts(), made.checkpoint.tokenizer, CONTEXT), 6))
    close: list[float] = []
    first: list[float] = []
    far: list[float] = []
    floors: list[float] = []
    with PteRuntime(made.path) as runtime:
        for seed, window in enumerate(scored):
            logits = parity.steps(runtime, window.tokens)
            for recipe, into in ((made.recipe, close), (replace(made.recipe, kv_cache="float"), far)):
                numerics = partial(xnnpack_numerics, recipe=recipe)
                found, floor = parity.measure_parity(logits, made.model, window, numerics=numerics, seed=seed)
                into.append(found.kl.mean())
                if into is close:
                    first.append(found.kl[:8].mean())
                    floors.append(floor.kl.mean())
            runtime.reset()
            assert np.abs(runtime.forward(window.tokens) - logits[-1].numpy()).max() < 0.5  # prefill = decode
    # A rounding that flips spreads through the rest of its window. Processors differ in which windows that meets.
    assert sorted(close)[1] <= 1e-10 and np.median(first) <= 1e-10
    assert np.mean(close) <= parity_limit(float(np.mean(floors))) < np.mean(far)


def test_the_file_says_so(made: Cut) -> None:
    assert [c for c in check_structure(made.path, made.model, provenance(INT8)) if c.verdict != "pass"] == []
    config = made.checkpoint.config
    memory = describe_artifact(made.path, made.model)["memory"]
    assert memory["kv_cache"] == 2 * 2 * CONTEXT * config.num_key_value_heads * (config.head_dim + 5)
    assert forecast_artifact(config, INT8, TARGETS["xnnpack"], CONTEXT).memory.kv_cache == memory["kv_cache"]


def test_a_recipe_for_the_other_cache_is_a_fault(
    made: Cut, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A float cache where the recipe says int8, and the reverse, are found by name."""
    other = lower(tiny_checkpoint.first_layers(2), RECIPES["int4-fast"], tmp_path / "model.pte")
    for cut, recipe in ((made, RECIPES["int4-fast"]), (other, INT8)):
        bad = {
            c.name: c.detail
            for c in check_structure(cut.path, cut.model, provenance(recipe))
            if c.verdict != "pass"
        }
        assert "sdpa" in bad.pop("structure.operators") and not bad


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
