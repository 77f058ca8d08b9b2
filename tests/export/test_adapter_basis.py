"""An adapter moved to a quantized model's basis changes it as it changes the checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.adapters import open_adapter, with_adapters
from edgellama.checkpoints.adapters.swappable import open_swappable, pairs_of
from edgellama.checkpoints.weights import load_llama
from edgellama.errors import CheckpointError
from edgellama.export.plan import calibration
from edgellama.export.quantization.adapter_basis import AdapterBasis, float_model
from edgellama.export.quantization.awq import fold, shared_channels
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.quantization.rotation import rotated
from edgellama.host.progress import Progress
from edgellama.model.adapted import Pair, adapted
from edgellama.model.layerwise import SHARED_INPUTS, layer_of
from edgellama.model.llama import Llama
from edgellama.recipe import RECIPES
from tests.helpers.adapters import Q0, adapter_of_all, matrices, write_adapter
from tests.helpers.tiny_models import random_checkpoint

TOKENS = torch.tensor([[1, 17, 200, 45, 99, 5, 311, 64]])


def folded(checkpoint: Checkpoint, rotation: str, *, trained_norms: bool) -> Llama:
    """The rotated checkpoint with random folds at every place, in float32, and perhaps with other norms."""
    model = load_llama(rotated(checkpoint, rotation), 16)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(parameter.clone(), requires_grad=False))
    for index in range(checkpoint.config.num_hidden_layers):
        for reading in SHARED_INPUTS:
            shared = shared_channels(reading, model.config)
            columns = (
                layer_of(model, index).get_submodule(reading.linears[0]).get_parameter("weight").shape[1]
            )
            scale = torch.rand(columns, generator=generator) + 0.5
            if shared is not None:
                scale = scale.reshape(-1, *shared)[:, :1].expand(-1, *shared).reshape(-1).contiguous()
            fold(layer_of(model, index), reading, scale, shared)
            if not reading.source.endswith("norm"):
                model.folds[f"model.layers.{index}.{reading.source}"] = scale
        if trained_norms:
            norm = layer_of(model, index).input_layernorm
            change = 1 + 0.1 * torch.randn(len(norm.weight), generator=generator)
            norm.weight = nn.Parameter(norm.weight * change, requires_grad=False)
    return model


@pytest.mark.parametrize("trained_norms", [False, True], ids=["calibrated", "recovered"])
@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("rotation", ["none", "values", "hidden"])
def test_base_and_adapter_moved_are_the_merged_model(
    rotation: str, biases: bool, trained_norms: bool, tmp_path: Path
) -> None:
    changes = {"attention_bias": biases, "num_hidden_layers": 2}
    checkpoint = random_checkpoint(tmp_path / "model", changes)
    swappable = open_swappable(checkpoint, adapter_of_all(checkpoint, tmp_path / "adapter"))
    model = folded(checkpoint, rotation, trained_norms=trained_norms)
    pairs = AdapterBasis(checkpoint, rotation, model).moved(swappable.pairs())
    floats = float_model(checkpoint, rotation, model)
    with torch.no_grad():
        wanted, plain = (load_llama(c, 16)(TOKENS) for c in (swappable.merged, checkpoint))
        with adapted(floats, pairs):
            actual = floats(TOKENS)
        base = floats(TOKENS)
    assert torch.allclose(base, plain, atol=2e-4 * float(plain.abs().max()))
    assert torch.allclose(actual, wanted, atol=2e-4 * float(wanted.abs().max()))
    assert not torch.allclose(wanted, plain, atol=0.05 * float(plain.abs().max())), (
        "the adapter does something"
    )
    if not trained_norms:
        with torch.no_grad(), adapted(model, pairs):
            assert torch.allclose(model(TOKENS), wanted, atol=2e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("rotation", ["values", "hidden"])
def test_each_merged_weight_rotated_is_the_rotated_base_and_the_moved_pair(
    rotation: str, tmp_path: Path
) -> None:
    checkpoint = random_checkpoint(tmp_path / "model", {})
    swappable = open_swappable(checkpoint, adapter_of_all(checkpoint, tmp_path / "adapter"))
    model = load_llama(rotated(checkpoint, rotation), 16)
    for name, pair in AdapterBasis(checkpoint, rotation, model).moved(swappable.pairs()).items():
        wanted = rotated(swappable.merged, rotation).tensor(f"{name}.weight")
        actual = rotated(checkpoint, rotation).tensor(f"{name}.weight") + pair.up @ pair.down
        assert torch.allclose(actual, wanted, atol=1e-5), name


def test_a_channel_whose_norm_is_zero_stays_without_a_value(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "model", {})
    read = checkpoint.read

    def with_a_zero(name: str) -> torch.Tensor:
        tensor = read(name)
        if name.endswith("input_layernorm.weight"):
            tensor = tensor.clone()
            tensor[3] = 0
        return tensor

    dead = replace(checkpoint, read=with_a_zero)
    basis = AdapterBasis(dead, "none", folded(dead, "none", trained_norms=True))
    assert bool(torch.isfinite(basis.column_scale("model.layers.0.self_attn.q_proj")).all())


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True], ids=["calibrated", "from the cache"])
def test_a_calibrated_model_keeps_its_folds(
    cached: bool, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint, recipe = tiny_checkpoint.first_layers(1), RECIPES["int4"]
    windows = calibration(checkpoint, recipe, 64)
    store = LayerStore(tmp_path / "store", "key")
    model, _ = quantized_llama(checkpoint, recipe, 64, Progress(), calibrated_on=windows, store=store)
    if cached:
        kept = model.folds
        model, _ = quantized_llama(checkpoint, recipe, 64, Progress(), calibrated_on=windows, store=store)
        assert model.folds.keys() == kept.keys() and all(model.folds[n].equal(s) for n, s in kept.items())
    assert model.folds.keys() == {"model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"}
    with torch.no_grad():
        actual, wanted = (
            float_model(checkpoint, recipe.rotation, model)(TOKENS),
            load_llama(checkpoint, 64)(TOKENS),
        )
    assert torch.allclose(actual, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_dora_is_merged_and_not_switched(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = {**matrices(), f"base_model.model.{Q0}.lora_magnitude_vector": torch.ones(128)}
    path = write_adapter(tmp_path / "dora", tensors, use_dora=True)
    with pytest.raises(CheckpointError, match="DoRA gives rows a length of their own") as caught:
        open_swappable(tiny_checkpoint, path)
    assert f"--adapter {path}" in str(caught.value.remedy)
    assert with_adapters(tiny_checkpoint, [path]).adapters


def test_a_pair_holds_the_factor(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a")
    ((name, pair),) = pairs_of(open_adapter(path)).items()
    merged, base = with_adapters(tiny_checkpoint, [path]), open_checkpoint(tiny_checkpoint.path)
    change = merged.tensor(f"{name}.weight") - base.tensor(f"{name}.weight")
    assert isinstance(pair, Pair) and torch.allclose(pair.up @ pair.down, change, atol=1e-5)
