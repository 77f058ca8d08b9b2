"""Quantization: codes and scales against a second implementation in numpy, and their rows in the report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.errors import RecipeError
from edgellama.export.quantization.quantize import rounded_llama
from edgellama.export.quantization.round_to_nearest import round_to_grid
from edgellama.formats.pte import read_pte
from edgellama.model.llama import Llama
from edgellama.model.quantized import Codes, QuantizedEmbedding, apply_codes, check_codes
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import BUDGETED, GIVEN, RECIPES, PerChannel, PerGroup, Recipe, Rule, Scheme
from edgellama.targets import TARGETS
from edgellama.targets.base import Storage
from edgellama.targets.sizes import planned_bytes
from tests.helpers.tiny_models import Cut, random_checkpoint, weight_of

Float = npt.NDArray[np.float64]
INT4, INT4_G64, INT8 = Scheme(4, PerGroup(32)), Scheme(4, PerGroup(64)), Scheme(8, PerChannel())


def to_bfloat16(x: Float) -> Float:
    """Rounds to nearest even on the upper 16 bits of the float32."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def grid(weight: Tensor, scheme: Scheme) -> tuple[Float, Float]:
    """Returns (groups [rows, groups, size], scales [rows, groups] by definition) in float64."""
    rows, columns = weight.shape
    groups = weight.numpy().astype(np.float64).reshape(rows, -1, scheme.group_size or columns)
    low, high = (-8, 7) if scheme.bits == 4 else (-127, 127)
    exact = np.maximum(groups.min(-1) / low, groups.max(-1) / high)
    return groups, to_bfloat16(exact)


def weights(rows: int = 64, columns: int = 256) -> Tensor:
    """Normal weights with outliers of both signs. Rows differ widely in size."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator) * torch.logspace(-1, 2, rows)[:, None]
    w[::3, 17] *= 8
    return w


@pytest.mark.parametrize("scheme", [INT4, INT4_G64, Scheme(4, PerChannel()), INT8], ids=Scheme.describe)
def test_codes_are_the_nearest_on_the_grid_of_the_stored_scale(scheme: Scheme) -> None:
    w = weights()
    codes = round_to_grid(w, scheme)
    groups, scales = grid(w, scheme)
    np.testing.assert_array_equal(codes.scales.numpy(), scales)
    low, high = (-8, 7) if scheme.bits == 4 else (-127, 127)
    representable = np.arange(low, high + 1) * scales[..., None, None]  # values that a group can represent
    nearest_error = np.abs(groups[..., None] - representable).min(-1)
    chosen = codes.values.numpy().reshape(groups.shape)
    error = np.abs(groups - chosen * scales[..., None])
    # Division in float32 may take either of two codes that are equally near to within its last bit.
    assert (error <= nearest_error + 1e-6 * scales[..., None]).all()
    np.testing.assert_array_equal(
        codes.dequantize().numpy(), (chosen * scales[..., None]).reshape(w.shape).astype(np.float32)
    )


@pytest.mark.parametrize("scheme", [INT4, INT8], ids=Scheme.describe)
def test_every_group_uses_an_end_of_the_range(scheme: Scheme) -> None:
    values = round_to_grid(weights(), scheme).values
    groups = values.reshape(64, -1, scheme.group_size or 256)
    low, high = scheme.code_range
    assert bool(((groups.amin(-1) == low) | (groups.amax(-1) == high)).all())
    assert (int(values.min()), int(values.max())) == (low, high)


def test_int8_never_uses_minus_128() -> None:
    w = -weights().abs()
    values = round_to_grid(w, INT8).values
    assert int(values.min()) == -127
    assert bool((values.amin(-1) == -127).all())


@pytest.mark.parametrize("scheme", [INT4, INT8], ids=Scheme.describe)
def test_scales_of_tiny_groups_fit_float16(scheme: Scheme) -> None:
    w = weights(8, 64)
    w[2] *= 1e-5 / w[2].abs().max()
    codes = round_to_grid(w, scheme)
    assert torch.equal(codes.scales.half().float(), codes.scales)
    assert float(codes.scales.min()) == 2.0**-14
    assert float((codes.dequantize()[2] - w[2]).abs().max()) <= 2.0**-15
    # A weight that is small as a whole has no larger group, so its scales stay small.
    assert float(round_to_grid(w * 1e-6, scheme).scales.min()) < 2.0**-24


@pytest.mark.parametrize("scheme", [INT4, INT8], ids=Scheme.describe)
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    w = weights(4, 64)
    w[1] = 0
    w[2, :32] = 0
    w[3] = 1e-45  # a subnormal whose scale would be 0
    codes = round_to_grid(w, scheme)
    check_codes("w", codes)
    assert not codes.dequantize()[1].any() and not codes.dequantize()[2, :32].any()
    assert codes.dequantize()[2, 32:].any()
    torch.testing.assert_close(codes.dequantize()[3], torch.zeros(64))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_size_of_the_weights_does_not_matter(scale: float) -> None:
    w = weights() * scale
    error = (round_to_grid(w, INT4).dequantize() - w).abs().amax(-1)
    assert bool((error < w.abs().amax(-1) / 7).all())


def _codes(**changes: Any) -> Codes:
    return replace(round_to_grid(weights(8, 64), INT4), **changes)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (_codes(values=torch.full((8, 64), 8, dtype=torch.int8)), r"codes outside -8\.\.7"),
        (_codes(values=torch.full((8, 64), -9, dtype=torch.int8)), r"codes outside -8\.\.7"),
        (
            Codes(torch.full((8, 64), -128, dtype=torch.int8), torch.ones(8, 1), INT8),
            r"codes outside -127\.\.127",
        ),
        (_codes(scales=torch.zeros(8, 2)), "not positive and finite"),
        (_codes(scales=-torch.ones(8, 2)), "not positive and finite"),
        (_codes(scales=torch.full((8, 2), math.nan)), "not positive and finite"),
        (_codes(scales=torch.full((8, 2), math.inf)), "not positive and finite"),
        (_codes(scales=torch.full((8, 2), 0.1)), "bfloat16 does not represent"),
    ],
)
def test_codes_that_no_artifact_could_hold_are_refused(codes: Codes, message: str) -> None:
    with pytest.raises(RecipeError, match=f"some.layer: .*{message}"):
        check_codes("some.layer", codes)


def quantized(checkpoint: Checkpoint, recipe: Recipe) -> tuple[Llama, dict[str, Any]]:
    """Model and the rows of its report by tensor name."""
    model, rows = rounded_llama(checkpoint, recipe, 16)
    assert len({row.name for row in rows}) == len(rows)
    return model, {row.name: row for row in rows}


def test_a_tied_head_and_embedding_share_their_codes(tiny_checkpoint: Checkpoint) -> None:
    model, rows = quantized(tiny_checkpoint, RECIPES["int4-fast"])
    embedding = model.model.embed_tokens
    head = model.lm_head.weight
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, IntxUnpackedToInt8Tensor)
    assert torch.equal(embedding.values, head.qdata)
    assert torch.equal(embedding.scales, head.scale[:, 0])
    # Two modules of the artifact, each with its own bytes.
    assert rows["model.embed_tokens.weight"].bytes == rows["lm_head.weight"].bytes == 512 * 128 + 512 * 2


def test_an_untied_head_has_codes_of_its_own(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "model", {"tie_word_embeddings": False})
    model, _ = quantized(checkpoint, RECIPES["int4-fast"])
    expected = round_to_grid(checkpoint.tensor("lm_head.weight"), INT8)
    assert torch.equal(weight_of(model, "lm_head").qdata, expected.values)
    embedding = model.model.embed_tokens
    assert isinstance(embedding, QuantizedEmbedding) and not torch.equal(embedding.values, expected.values)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_report_has_a_row_for_every_tensor(recipe: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(
        tmp_path / "model", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    )
    _, rows = quantized(checkpoint, RECIPES[recipe])
    shapes = checkpoint.config.tensor_shapes()
    assert {name: row.shape for name, row in rows.items()} == shapes
    schemes = RECIPES[recipe].assign(module_shapes(shapes, tied=False))
    for name, row in rows.items():
        scheme = schemes.get(name.removesuffix(".weight"))
        assert row.scheme == (scheme.describe() if scheme else "float32"), name
        assert row.bits == (scheme.bits if scheme else 32)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}],
    ids=["tied", "untied"],
)
def test_planned_bytes_are_the_sum_of_the_rows(recipe: str, changes: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "model", changes)
    _, rows = quantized(checkpoint, RECIPES[recipe])
    storage, rope = (
        Storage(float_bytes=4, row_scale_bytes=2, tied_once=False),
        4 * 16 * checkpoint.config.head_dim,
    )
    planned = planned_bytes(checkpoint.config, RECIPES[recipe], storage, 16)
    assert planned - rope == sum(row.bytes for row in rows.values())


@pytest.mark.parametrize("recipe", [n for n, r in RECIPES.items() if r.algorithm not in (*BUDGETED, GIVEN)])
@pytest.mark.slow
def test_planned_bytes_are_those_of_the_artifact(recipe: str, cut: Callable[[int, str], Cut]) -> None:
    lowered = cut(1, recipe)
    pte = read_pte(lowered.path)
    weights = sum(len(c.data) for c in pte.constants) + sum(linear.nbytes for linear in pte.linears)
    planned = planned_bytes(
        lowered.checkpoint.config, lowered.recipe, TARGETS["xnnpack"].storage, lowered.model.context_length
    )
    assert weights == planned
    assert weights < pte.bytes


def test_sqnr_is_that_of_the_dequantized_weights(tiny_checkpoint: Checkpoint) -> None:
    model, rows = quantized(tiny_checkpoint, RECIPES["int4-fast"])
    for name in ("model.layers.0.mlp.down_proj", "lm_head", "model.embed_tokens"):
        source = "model.embed_tokens" if name == "lm_head" else name
        w = tiny_checkpoint.tensor(f"{source}.weight").numpy().astype(np.float64)
        module = model.get_submodule(name)
        if isinstance(module, QuantizedEmbedding):
            codes = Codes(module.values, module.scales[:, None], INT8)
        else:
            codes = Codes(weight_of(model, name).qdata, weight_of(model, name).scale, INT8)
        scales = np.repeat(codes.scales.numpy(), w.shape[1] // codes.scales.shape[1], axis=1)
        stored = codes.values.numpy() * scales.astype(np.float64)
        sqnr = 10 * np.log10((w**2).sum() / ((w - stored) ** 2).sum())
        assert rows[f"{name}.weight"].sqnr_db == pytest.approx(sqnr, abs=1e-3)
        assert (30 if name != "model.layers.0.mlp.down_proj" else 15) < sqnr < 60
    norm = rows["model.norm.weight"]
    assert norm.sqnr_db == math.inf and norm.to_dict()["sqnr_db"] is None


def _recipe(*rules: Rule) -> Recipe:
    return Recipe("mine", "for tests", rules, 0.1, 0.1)


EMBEDDING = Rule("model.embed_tokens", None)


def test_groups_that_do_not_divide_name_layers_and_sizes(tiny_checkpoint: Checkpoint) -> None:
    config = tiny_checkpoint.config
    shapes = module_shapes(config.tensor_shapes(), tied=True)
    with pytest.raises(RecipeError, match=r"mlp\.down_proj.* have rows of 352") as caught:
        check_recipe(_recipe(EMBEDDING, Rule("*", INT4_G64)), shapes)
    assert "up_proj" not in str(caught.value)
    assert "Group sizes that divide them: 32." in caught.value.remedy
    assert "int8 per channel" in caught.value.remedy
    # The rule from the remedy makes the recipe applicable.
    check_recipe(_recipe(EMBEDDING, Rule("*.down_proj", INT8), Rule("*", INT4_G64)), shapes)


def test_the_remedy_names_rows_that_no_group_size_divides() -> None:
    shapes = {"model.embed_tokens": (512, 48), "lm_head": (512, 48)}
    with pytest.raises(RecipeError, match="lm_head have rows of 48") as caught:
        check_recipe(_recipe(EMBEDDING, Rule("*", INT4)), shapes)
    assert "No group size divides them" in caught.value.remedy


@pytest.mark.parametrize(
    "scheme", [INT8, INT4, Scheme(4, PerChannel(), int8_activations=False)], ids=Scheme.describe
)
def test_an_embedding_that_no_kernel_reads_is_refused(scheme: Scheme) -> None:
    shapes = {"model.embed_tokens": (512, 64), "lm_head": (512, 64)}
    with pytest.raises(RecipeError, match="the embedding cannot be"):
        check_recipe(_recipe(Rule("model.embed_tokens", scheme), Rule("*", INT8)), shapes)


def test_integer_weights_with_float_activations_are_refused() -> None:
    shapes = {"model.embed_tokens": (512, 64), "lm_head": (512, 64)}
    weight_only = Scheme(4, PerGroup(32), int8_activations=False)
    with pytest.raises(RecipeError, match="lm_head would have integer weights and float activations"):
        check_recipe(_recipe(EMBEDDING, Rule("*", weight_only)), shapes)


def test_the_model_computes_with_foreign_codes(tiny_checkpoint: Checkpoint) -> None:
    model, _ = quantized(tiny_checkpoint.first_layers(1), RECIPES["int4-fast"])
    name = "model.layers.0.self_attn.q_proj"
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    tokens = torch.arange(3, 15)[None]
    generator = torch.Generator().manual_seed(1)
    foreign = Codes(
        torch.randint(-8, 8, (128, 128), generator=generator, dtype=torch.int8),
        torch.full((128, 4), 0.0078125),
        INT4,
    )
    with torch.no_grad():
        before = model(tokens)
        apply_codes(model, name, foreign)
        x = torch.randn(5, 128, generator=generator)
        expected = x.numpy().astype(np.float64) @ (foreign.values.numpy() * 0.0078125).T
        actual = linear(x).numpy()
        after = model(tokens)
    # int8 activations leave an SNR of about 40 dB. The old codes or unapplied scales would leave none.
    assert 1e-3 < np.sqrt(((actual - expected) ** 2).mean() / (expected**2).mean()) < 0.02
    assert not torch.allclose(before, after, atol=0.1)


def test_foreign_codes_of_an_embedding(tiny_checkpoint: Checkpoint) -> None:
    model = load_llama(tiny_checkpoint.first_layers(1), 16)
    values = torch.arange(512 * 128).remainder(255).sub(127).to(torch.int8).reshape(512, 128)
    codes = Codes(values, torch.full((512, 1), 0.5), Scheme(8, PerChannel(), int8_activations=False))
    apply_codes(model, "model.embed_tokens", codes)
    assert torch.equal(model.model.embed_tokens(torch.tensor([[3]]))[0, 0], values[3] * 0.5)
