"""Faults of the quantizer, on both sides of the gate: no parity shows them, and the limit of the KL is out of reach."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.weights import load_weights
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.export.quantization import calibrate, quantize, rotation, tensors
from edgellama.export.quantization.awq import fold
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.quantization.round_to_nearest import round_to_grid
from edgellama.export.quantization.scale_search import codes_at
from edgellama.gate.weights import check_weights
from edgellama.model.llama import Llama
from edgellama.model.quantized import Codes, QuantizedEmbedding, apply_codes, codes_of
from edgellama.recipe import RECIPES, Recipe
from tests.helpers.tiny_models import CONTEXT, random_checkpoint, write_hf

pytestmark = pytest.mark.slow

FAST = RECIPES["int4-fast"]
CALIBRATED = replace(RECIPES["int4"], name="quick", calibration_tokens=2048)
LAYER = "model.layers.0."
Q, V, O, UP, DOWN = (
    f"{LAYER}{name}"
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
)


@pytest.fixture(scope="module")
def two_layers(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("model") / "two"
    return open_checkpoint(write_hf(tiny_checkpoint.first_layers(2), path))


@dataclass(frozen=True)
class Calibrated:
    """A checkpoint with its soundly calibrated model, and that model's rows."""

    checkpoint: Checkpoint
    model: Llama
    rows: Any


@pytest.fixture(scope="module")
def calibrated(two_layers: Checkpoint) -> Calibrated:
    model, rows = quantized_llama(two_layers, CALIBRATED, CONTEXT)
    return Calibrated(two_layers, model, rows)


def failed(checkpoint: Checkpoint, recipe: Recipe, directory: Path) -> dict[str, str]:
    """Exports and validates; name and detail of the checks that do not pass."""
    bundle = export(checkpoint, directory / "a.edgellama", recipe=recipe, context=CONTEXT, validate=False)
    report = validate(bundle, reference=checkpoint, tokens=256, max_kl=100.0, relower=False)
    return {c.name: c.detail for c in report.checks if c.verdict != "pass"}


def recode(
    model: Llama, name: str, values: Callable[[Tensor], Tensor], scales: Callable[[Tensor], Tensor]
) -> None:
    codes = codes_of(model.get_submodule(name))
    assert codes is not None
    new_scales = scales(codes.scales.clone()).to(torch.bfloat16).float()
    new_codes = replace(codes, values=values(codes.values.clone()), scales=new_scales)
    if name == "model.embed_tokens":
        model.set_submodule(name, QuantizedEmbedding(new_codes))
    else:
        apply_codes(model, name, new_codes)


def linear(model: Llama, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def same(x: Tensor) -> Tensor:
    return x


def set_rows(rows: Any, value: Any) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x[rows] = value
        return x

    return change


def swapped(axis: int, first: int, second: int) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        order = list(range(x.shape[axis]))
        order[first], order[second] = second, first
        return x.index_select(axis, torch.tensor(order)).contiguous()

    return change


def every_layer(change: Callable[[Llama, str], None], name: str) -> Callable[[Llama], None]:
    def damage(model: Llama) -> None:
        for index in range(model.config.num_hidden_layers):
            change(model, name.replace("layers.0", f"layers.{index}"))

    return damage


def last_group_dropped(model: Llama, name: str) -> None:
    recode(model, name, set_rows((slice(None), slice(-32, None)), 0), same)


def row_zeroed(model: Llama, name: str) -> None:
    recode(model, name, set_rows(5, 0), same)


def rows_exchanged(model: Llama) -> None:
    recode(model, Q, swapped(0, 3, 40), swapped(0, 3, 40))


def columns_exchanged(model: Llama) -> None:
    recode(model, DOWN, swapped(1, 7, 300), same)


def columns_turned(model: Llama) -> None:
    recode(model, DOWN, lambda x: x.roll(1, 1), same)


def halves_exchanged(model: Llama) -> None:
    recode(model, Q, lambda x: x.reshape(len(x), -1, 2).flip(2).reshape(x.shape), same)


def group_doubled(model: Llama) -> None:
    recode(model, O, same, lambda s: set_rows((9, 1), 2 * s[9, 1])(s))


def scales_of_neighbours(model: Llama) -> None:
    recode(model, O, same, lambda s: s.roll(1, 1) * 3)


def nibbles_without_sign(model: Llama) -> None:
    recode(model, UP, lambda x: x.abs().clamp(max=7), same)


def sign_turned(model: Llama) -> None:
    recode(model, V, lambda x: (-x).clamp(-8, 7), same)


def scales_too_large(model: Llama, name: str) -> None:
    recode(model, name, same, lambda s: s * 1.04)


def layers_exchanged(model: Llama) -> None:
    first, second = (linear(model, n) for n in (Q, Q.replace("layers.0", "layers.1")))
    first.weight, second.weight = second.weight, first.weight


def up_takes_gate(model: Llama) -> None:
    linear(model, UP).weight = linear(model, UP.replace("up_", "gate_")).weight


def norm_altered(model: Llama) -> None:
    model.get_parameter(f"{LAYER}input_layernorm.weight").mul_(1.03)


def norm_turned(model: Llama) -> None:
    model.get_parameter(f"{LAYER}post_attention_layernorm.weight")[4] *= -1


def final_norm_altered(model: Llama) -> None:
    model.model.norm.weight[11] *= 1.001


def fold_of_rows_alone(model: Llama) -> None:
    recode(model, UP, same, lambda s: set_rows(slice(0, 352, 2), s[::2] / 2)(s))


def table_rows_exchanged(model: Llama) -> None:
    recode(model, "model.embed_tokens", swapped(0, 400, 401), swapped(0, 400, 401))


def table_scale_altered(model: Llama) -> None:
    recode(model, "model.embed_tokens", same, lambda s: set_rows(500, s[500] * 1.02)(s))


def head_untied(model: Llama) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = codes_of(model.lm_head)
    assert codes is not None
    noise = codes.dequantize() * (1 + 0.05 * torch.randn(codes.values.shape, generator=generator))
    apply_codes(model, "lm_head", round_to_grid(noise, codes.scheme))


FAULTS = [
    pytest.param(every_layer(last_group_dropped, O), "weights.size", id="last group of every o_proj dropped"),
    pytest.param(every_layer(row_zeroed, V), "weights.direction", id="a row of every v_proj zero"),
    pytest.param(rows_exchanged, "weights.direction", id="two rows of q_proj exchanged"),
    pytest.param(columns_exchanged, "weights.direction", id="two columns of down_proj exchanged"),
    pytest.param(columns_turned, "weights.direction", id="columns one place late"),
    pytest.param(halves_exchanged, "weights.direction", id="nibbles of a byte exchanged"),
    pytest.param(group_doubled, "weights.size", id="scale of one group doubled"),
    pytest.param(scales_of_neighbours, "weights.size", id="scales of the neighbouring group"),
    pytest.param(nibbles_without_sign, "weights.direction", id="codes without sign"),
    pytest.param(sign_turned, "weights.direction", id="v_proj with the opposite sign"),
    pytest.param(every_layer(scales_too_large, Q), "weights.size", id="scales of q_proj 4 % too large"),
    pytest.param(layers_exchanged, "weights.direction", id="q_proj of two layers exchanged"),
    pytest.param(up_takes_gate, "weights.direction", id="up_proj holds gate_proj"),
    pytest.param(norm_altered, "weights.size", id="a norm 3 % too large, its linears as they were"),
    pytest.param(norm_turned, "weights.floats", id="one norm weight with the opposite sign"),
    pytest.param(final_norm_altered, "weights.floats", id="one weight of the final norm altered"),
    pytest.param(fold_of_rows_alone, "weights.folds", id="fold applied to up_proj and not to down_proj"),
    pytest.param(table_rows_exchanged, "weights.codes", id="two rows of the table exchanged"),
    pytest.param(table_scale_altered, "weights.scales", id="scale of one table row 2 % too large"),
    pytest.param(head_untied, "weights.codes", id="lm_head is not the tied table"),
]
BUNDLED = {
    "last group of every o_proj dropped",
    "a row of every v_proj zero",
    "scale of one group doubled",
    "a norm 3 % too large, its linears as they were",
    "one weight of the final norm altered",
    "fold applied to up_proj and not to down_proj",
    "two rows of the table exchanged",
    "scale of one table row 2 % too large",
}


@pytest.mark.parametrize(("damage", "check"), FAULTS)
def test_calibrated_weights(damage: Callable[[Llama], None], check: str, calibrated: Calibrated) -> None:
    broken = copy.deepcopy(calibrated.model)
    with torch.no_grad():
        damage(broken)
    checks = check_weights(broken, CALIBRATED, calibrated.checkpoint.tensor)
    assert check in [c.name for c in checks if c.verdict != "pass"]


@pytest.mark.parametrize(("damage", "check"), [case for case in FAULTS if case.id in BUNDLED])
def test_a_calibrated_bundle(
    damage: Callable[[Llama], None],
    check: str,
    calibrated: Calibrated,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The bundle is made of a damaged model: its codes, hashes and floats fit each other."""
    broken = copy.deepcopy(calibrated.model)
    with torch.no_grad():
        damage(broken)
    monkeypatch.setattr(quantize, "calibrated_llama", lambda *_, **__: (broken, calibrated.rows))
    failures = failed(calibrated.checkpoint, CALIBRATED, tmp_path)
    assert check in failures, failures
    assert all(name.startswith("weights.") for name in failures), failures


def test_a_sound_calibrated_bundle(
    calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quantize, "calibrated_llama", lambda *_, **__: (calibrated.model, calibrated.rows))
    assert failed(calibrated.checkpoint, CALIBRATED, tmp_path) == {}


def scaled_up(weight: Tensor, scheme: Any) -> Codes:
    """Scales 2 % too large, with codes that fit them."""
    codes = round_to_grid(weight, scheme)
    return codes_at(weight, (codes.scales * 1.02).to(torch.bfloat16).float(), scheme)


def rounded_down(weight: Tensor, scheme: Any) -> Codes:
    codes = round_to_grid(weight, scheme)
    scales = codes.scales.repeat_interleave(weight.shape[1] // codes.scales.shape[1], 1)
    values = (weight / scales).floor().clamp(*scheme.code_range).to(torch.int8)
    return replace(codes, values=values)


def top_code_lost(weight: Tensor, scheme: Any) -> Codes:
    codes = round_to_grid(weight, scheme)
    return replace(codes, values=codes.values.clamp(max=scheme.code_range[1] - 1))


def one_row_repeated(weight: Tensor, scheme: Any) -> Codes:
    codes = round_to_grid(weight, scheme)
    codes.values[1], codes.scales[1] = codes.values[0], codes.scales[0]
    return codes


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        pytest.param(scaled_up, "weights.scales", id="scales 2 % too large"),
        pytest.param(rounded_down, "weights.codes", id="codes rounded down"),
        pytest.param(top_code_lost, "weights.codes", id="largest code never used"),
        pytest.param(one_row_repeated, "weights.codes", id="a row written twice"),
    ],
)
def test_plain_rounding(
    fault: Callable[[Tensor, Any], Codes],
    check: str,
    two_layers: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Export and gate round with the same fault."""
    monkeypatch.setattr(tensors, "round_to_grid", fault)
    failures = failed(two_layers, FAST, tmp_path)
    assert check in failures, failures


def test_a_norm_that_is_read_wrongly_by_the_quantizer(
    two_layers: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(model: Llama, *arguments: Any, **options: Any) -> None:
        load_weights(model, *arguments, **options)
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight") and not parameter.is_meta:
                module = model.get_submodule(name.removesuffix(".weight"))
                module.weight = nn.Parameter(parameter.bfloat16().float() * 1.01, requires_grad=False)

    monkeypatch.setattr(tensors, "load_weights", load)
    failures = failed(two_layers, FAST, tmp_path)
    assert set(failures) == {"weights.floats"}


def test_a_rotation_that_changes_the_function(
    two_layers: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The values of one head are turned by a matrix that o_proj does not undo."""
    of = rotation.Rotation.of
    calls = iter(range(10**6))

    def crooked(size: int, seed: int) -> rotation.Rotation:
        turned = of(size, seed)
        return replace(turned, signs=turned.signs * (1 + 1e-2 * (next(calls) % 2)))

    monkeypatch.setattr(rotation.Rotation, "of", crooked)
    failures = failed(two_layers, replace(FAST, name="rotated", rotation="values"), tmp_path)
    assert set(failures) == {"weights.rotation"}


def test_a_fold_of_one_side(two_layers: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calibration multiplies the columns after v_proj and forgets to divide its rows."""

    def forgetful(layer: Any, reading: Any, scale: Tensor, shared: Any) -> None:
        source = layer.get_submodule(reading.source)
        kept = source.weight.clone()
        scale = scale * 2
        fold(layer, reading, scale, shared)
        if reading.source == "self_attn.v_proj":
            source.weight.copy_(kept)

    monkeypatch.setattr(calibrate, "fold", forgetful)
    model, _ = quantized_llama(two_layers, CALIBRATED, CONTEXT)
    weights = {name: two_layers.tensor(name) for name in two_layers.config.tensor_shapes()}
    failures = [c.name for c in check_weights(model, CALIBRATED, weights.__getitem__) if c.verdict != "pass"]
    assert failures == ["weights.folds"]


def test_scales_that_are_searched(two_layers: Checkpoint) -> None:
    recipe = replace(CALIBRATED, algorithm="scales")
    model, _ = quantized_llama(two_layers, recipe, CONTEXT)
    weights = {name: two_layers.tensor(name) for name in two_layers.config.tensor_shapes()}

    def failures() -> list[str]:
        return [c.name for c in check_weights(model, recipe, weights.__getitem__) if c.verdict != "pass"]

    assert failures() == []
    recode(model, DOWN, same, lambda s: s * 1.02)
    assert failures() == ["weights.codes"]


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 1, "hidden_size": 128, "intermediate_size": 160, "head_dim": 32},
        {"tie_word_embeddings": False, "num_key_value_heads": 4, "num_hidden_layers": 2},
    ],
    ids=["biases", "one value head", "untied"],
)
@pytest.mark.parametrize("turned", ["none", "values", "hidden"])
def test_sound_models_of_other_shapes(changes: dict[str, Any], turned: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "model", changes)
    recipe = replace(CALIBRATED, rotation=turned)
    model, _ = quantized_llama(checkpoint, recipe, CONTEXT)
    source = rotation.rotated(checkpoint, turned)
    checks = check_weights(model, recipe, source.tensor)
    assert [c for c in checks if c.verdict != "pass"] == []


def test_a_bias_that_is_lost(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "model", {"attention_bias": True, "mlp_bias": True})
    model, _ = quantized_llama(checkpoint, CALIBRATED, CONTEXT)
    for name in (Q, UP):
        bias = model.get_parameter(f"{name}.bias")
        with torch.no_grad():
            kept = bias.clone()
            bias.zero_()
        checks = check_weights(model, CALIBRATED, checkpoint.tensor)
        assert [c.name for c in checks if c.verdict != "pass"] == ["weights.floats"]
        with torch.no_grad():
            bias.copy_(kept)
