"""Rotation changes the weights and keeps the function. A rotated model passes the gate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.commands.export import export, forecast
from edgellama.commands.validate import validate
from edgellama.errors import RecipeError
from edgellama.export.plan import calibration
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.rotation import Rotation, rotated
from edgellama.recipe import RECIPES, Recipe
from tests.helpers.tiny_models import CONTEXT, random_checkpoint

pytestmark = pytest.mark.slow

ROTATIONS = ("values", "hidden")


@pytest.mark.parametrize("size", [1, 7, 16, 96, 576, 2048])
def test_the_matrix_is_orthogonal_and_mixes_everything(size: int) -> None:
    matrix = Rotation.of(size, seed=0)(torch.eye(size))
    product = matrix.double() @ matrix.T.double()
    torch.testing.assert_close(product, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(matrix, Rotation.of(size, seed=0)(torch.eye(size)))
    if size > 1:
        assert not torch.equal(matrix, Rotation.of(size, seed=1)(torch.eye(size)))
        assert int((matrix == 0).sum()) == 0


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_rotation_keeps_the_function(rotation: str, tied: bool, biases: bool, tmp_path: Path) -> None:
    changes = {
        "hidden_size": 96,
        "tie_word_embeddings": tied,
        "attention_bias": biases,
        "mlp_bias": biases,
        "num_hidden_layers": 2,
    }
    checkpoint = random_checkpoint(tmp_path / "model", changes)
    rotated_checkpoint = rotated(checkpoint, rotation)
    assert rotated_checkpoint.config.tie_word_embeddings == (tied and rotation == "values")
    assert rotated_checkpoint.infos.keys() == rotated_checkpoint.config.tensor_shapes().keys()
    model, rotated_model = load_llama(checkpoint, 32), load_llama(rotated_checkpoint, 32)
    tokens = torch.arange(24)[None]
    torch.testing.assert_close(rotated_model(tokens), model(tokens), rtol=1e-4, atol=1e-4)
    moved = {
        name
        for name, _ in rotated_model.named_parameters()
        if not torch.equal(
            checkpoint.tensor(name if name in checkpoint.infos else "model.embed_tokens.weight"),
            rotated_checkpoint.tensor(name),
        )
    }
    linears = {name for name in moved if name.startswith("model.layers.") and name.endswith("proj.weight")}
    assert len(linears) == (2 * 7 if rotation == "hidden" else 2 * 2)
    assert ("model.embed_tokens.weight" in moved) == (rotation == "hidden")


def recipe(rotation: str, algorithm: str) -> Recipe:
    """int4 recipe with that rotation and a short calibration."""
    base = RECIPES["int4-fast"] if algorithm == "round" else replace(RECIPES["int4"], calibration_tokens=2048)
    return replace(base, name="rotated", rotation=rotation)


@pytest.mark.parametrize(
    ("rotation", "algorithm", "targets"),
    [
        ("hidden", "round", ("xnnpack", "onnx")),
        ("hidden", "gptq", ("coreml",)),
        ("values", "gptq", ("xnnpack",)),
    ],
)
def test_a_rotated_bundle_passes_and_is_validated_against_the_checkpoint(
    rotation: str, algorithm: str, targets: tuple[str, ...], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    cut, rotated_recipe = tiny_checkpoint.first_layers(1), recipe(rotation, algorithm)
    bundle = export(
        cut, tmp_path / "b.edgellama", recipe=rotated_recipe, targets=targets, context=64, max_kl=1.0
    )
    assert bundle.manifest["recipe"]["rotation"] == rotation
    assert bundle.config.tie_word_embeddings == (rotation == "values")
    assert bundle.manifest["source"]["parameters"] == cut.config.parameters
    planned = {
        a["target"]: a["bytes"]
        for a in forecast(cut, targets=targets, recipe=rotated_recipe, context=64)["artifacts"]
    }
    for entry in bundle.manifest["artifacts"]:
        assert entry["bytes"] == pytest.approx(planned[entry["target"]], rel=0.25)
    report = validate(Bundle.open(bundle.path), reference=cut, tokens=256, layers=True)
    assert report.passed, report.to_text()
    # A part in the wrong basis would cost a higher KL than all parts together.
    kl_of_all = report.layers["split"]["all"]["kl"]
    assert max(part["kl_alone"] for part in report.layers["parts"]) < 1.5 * kl_of_all


def test_each_rotation_has_its_own_calibration(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELLAMA_CACHE", str(tmp_path))
    stores = set()
    for rotation in ("none", *ROTATIONS):
        rotated_recipe = recipe(rotation, "gptq")
        calibration_windows = calibration(tiny_checkpoint, rotated_recipe, CONTEXT)
        assert calibration_windows is not None
        stores.add(LayerStore.of(tiny_checkpoint, rotated_recipe, calibration_windows).directory)
    assert len(stores) == 3


def test_unknown_rotations_are_refused() -> None:
    with pytest.raises(RecipeError, match="unknown rotation 'learned'"):
        replace(RECIPES["int4"], rotation="learned")
