"""Target `mlx`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.targets.base import Activations, Target
from edgellama.targets.mlx.storage import STORAGE

if TYPE_CHECKING:
    from torch import Tensor

    from edgellama.formats.listing import Listing
    from edgellama.model.config import LlamaConfig
    from edgellama.model.llama import Llama
    from edgellama.recipe import Recipe
    from edgellama.report import Check
    from edgellama.targets.provenance import Provenance


class MlxTarget(Target):
    """MLX: weights as codes, activations in floats."""

    name = "mlx"
    summary = "MLX directory for mlx-swift-lm, mlx-lm and MLXLanguageModel: GPUs of iPhone, iPad and Mac"
    artifact = "mlx"
    copies = 0.3  # tensors are written one by one, and the largest is the table
    artifact_files = ("model.safetensors",)
    storage = STORAGE
    packages = ()
    extra = "mlx"
    options = ("mlx_dtype",)
    activations = Activations.FLOAT
    compute_bytes = 2
    all_logits = True
    device_runtime = "mlx"
    device_backends = ("metal",)
    parity_kl = 1e-6  # float32 on both sides
    assumed_floor = 0.0

    @property
    def device_kl(self) -> float:
        """Allows for the 16-bit activations of a GPU, where the host's runtime computes in float32."""
        return 1e-2

    def check(self, config: LlamaConfig, recipe: Recipe, context_length: int) -> None:
        from edgellama.targets.mlx.limits import check_model

        check_model(config, recipe)

    def is_slow_here(self) -> bool:
        """MLX is made for Apple's GPUs. Its CPU backend multiplies without vector instructions."""
        return sys.platform != "darwin"

    def arithmetic(self, model: Llama, recipe: Recipe) -> AbstractContextManager[None]:
        from edgellama.targets.mlx.numerics import mlx_numerics

        return mlx_numerics(model, recipe)

    def stored_floats(self, model: Llama, recipe: Recipe) -> AbstractContextManager[None]:
        from edgellama.targets.mlx.numerics import stored_floats

        return stored_floats(model, recipe)

    def check_structure(self, path: Path, model: Llama, provenance: Provenance) -> list[Check]:
        from edgellama.targets.mlx.structure import check_structure

        return check_structure(path, model, provenance)

    def listing(self, path: Path, model: Llama) -> Listing:
        from edgellama.formats.mlx_listing import list_mlx
        from edgellama.formats.mlx_model import read_mlx

        return list_mlx(read_mlx(path))

    def describe(self, path: Path, model: Llama) -> dict[str, Any]:
        from edgellama.targets.mlx.describe import describe_artifact

        return describe_artifact(path, model)

    def bound_manifest(self, path: Path) -> str | None:
        from edgellama.formats.mlx_model import read_mlx
        from edgellama.targets.mlx.interface import MANIFEST_SHA256

        return read_mlx(path).metadata.get(MANIFEST_SHA256)

    def stored_codes(self, path: Path) -> Iterator[tuple[Tensor, Tensor]]:
        from edgellama.targets.mlx.structure import stored_codes

        return stored_codes(path)
