"""Small models for tests: cuts of the trained tiny Llama, and random Llamas of any shape."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.xnnpack.lower import lower_to_xnnpack
from edgellama.gate.adapted_reference import AdaptedReference
from edgellama.gate.references import QuantizedReference
from edgellama.host.progress import Progress
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import Llama
from edgellama.recipe import Recipe
from edgellama.targets import TARGETS
from edgellama.targets.provenance import Provenance
from tests.helpers.paths import TINY

__all__ = ["CONTEXT", "TINY", "Cut", "lower", "provenance", "random_checkpoint", "weight_of", "write_hf"]

CONTEXT = 128


@dataclass(frozen=True)
class Cut:
    """The first layers of a checkpoint, quantized, and the .pte lowered from them."""

    checkpoint: Checkpoint
    recipe: Recipe
    model: Llama
    path: Path

    @property
    def exact_reference(self) -> QuantizedReference:
        """The whole model in XNNPACK's arithmetic, rounding for rounding.

        The walk layer by layer rounds activations alike, and sums in another order.
        """
        return AdaptedReference(self.model, self.recipe, TARGETS["xnnpack"], {})


def provenance(recipe: Recipe) -> Provenance:
    """Provenance for artifacts that are lowered without an export."""
    return Provenance("Apache-2.0", 1, "a" * 64, "b" * 64, "0", recipe)


def lower(checkpoint: Checkpoint, recipe: Recipe, path: Path, *, context: int = CONTEXT) -> Cut:
    """Quantizes a checkpoint and lowers it to a .pte at `path`."""
    model, _ = quantized_llama(checkpoint, recipe, context)
    lower_to_xnnpack(model, path, provenance(recipe), progress=Progress())
    return Cut(checkpoint, recipe, model, path)


def weight_of(model: Llama, name: str) -> Any:
    """Weight of a module: a tensor, or a torchao tensor with `qdata`, `scale` and `zero_point`."""
    return model.get_submodule(name).weight


def write_hf(checkpoint: Checkpoint, directory: Path) -> Path:
    """Writes a cut of the tiny model as a Hugging Face directory, which the command line can open."""
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, directory)
    config = json.loads((TINY / "config.json").read_text())
    config["num_hidden_layers"] = checkpoint.config.num_hidden_layers
    (directory / "config.json").write_text(json.dumps(config))
    weights = {name: checkpoint.read(name).clone() for name in checkpoint.config.tensor_shapes()}
    save_file(weights, directory / "model.safetensors")
    return directory


def random_checkpoint(directory: Path, changes: Mapping[str, Any]) -> Checkpoint:
    """A one-layer Llama with random weights, biases and norms, written as a Hugging Face directory and opened."""
    data = {
        **json.loads((TINY / "config.json").read_text()),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        **changes,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(data))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in LlamaConfig.from_hf(data).tensor_shapes().items():
        values = 0.2 * torch.randn(shape, generator=generator)
        weights[name] = values + 1 if name.endswith("norm.weight") else values
    save_file(weights, directory / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, directory)
    return open_checkpoint(directory)


def copy_bound(cut: Path, path: Path, provenance: Provenance) -> None:
    """Copies a .pte of `lower`, with the hash of the bundle's own manifest."""
    path.write_bytes(cut.read_bytes().replace(b"b" * 64, provenance.manifest_sha256.encode()))
