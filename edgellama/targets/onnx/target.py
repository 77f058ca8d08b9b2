"""Target `onnx`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.targets.base import Activations, Target
from edgellama.targets.families import Family
from edgellama.targets.onnx.storage import STORAGE

if TYPE_CHECKING:
    from torch import Tensor

    from edgellama.formats.listing import Listing
    from edgellama.model.activations import ActivationRounding
    from edgellama.model.adapted import Pairs
    from edgellama.model.config import LlamaConfig
    from edgellama.model.llama import Llama
    from edgellama.recipe import Recipe
    from edgellama.report import Check
    from edgellama.targets.adapters import StoredAdapter
    from edgellama.targets.provenance import Provenance


class OnnxTarget(Target):
    """ONNX Runtime: int8 activations as the processor's kernels round them (form `ort`), or floats (`portable`)."""

    name = "onnx"
    summary = "ONNX model for ONNX Runtime and onnxruntime-genai: Android, Windows, Linux, macOS"
    artifact = "onnx"
    copies = 0.3  # tensors are written one by one, and the largest is the table
    artifact_files = ("model.onnx", "model.onnx.data")
    storage = STORAGE
    packages = ("onnx", "onnxruntime")
    extra = "onnx"
    options = ("onnx_form", "onnx_rounding")
    activations = Activations.INT8_PER_BLOCK
    device_runtime = "onnxruntime"
    device_backends = ("xnnpack", "coreml", "qnn")
    adapter_ending = ".onnx_adapter"
    parity_kl = 1e-3
    assumed_floor = 0.03

    def check(self, config: LlamaConfig, recipe: Recipe, context_length: int) -> None:
        from edgellama.targets.onnx.limits import check_blocks, check_heads

        check_blocks(config, recipe, context_length)
        check_heads(config, recipe)

    def arithmetic(self, model: Llama, recipe: Recipe) -> AbstractContextManager[None]:
        from edgellama.targets.onnx.numerics import onnx_numerics

        return onnx_numerics(model, self.rounding(recipe))

    def rounding(self, recipe: Recipe) -> ActivationRounding | None:
        return self.rounding_of(recipe, self.family_here(recipe))

    def families(self, recipe: Recipe) -> tuple[Family, ...]:
        from edgellama.targets.onnx.families import families

        return families(recipe)

    def family_here(self, recipe: Recipe) -> Family | None:
        families = self.families(recipe)
        if not families:
            return None
        with self.needs_extra():
            from edgellama.targets.onnx.interface import session_entries
            from edgellama.targets.onnx.rounding_probe import rounding_here

        name = rounding_here(tuple(session_entries(recipe).items()))
        # Int8 weights are rounded per block also where KleidiAI rounds the inputs of int4 weights per row.
        return next((family for family in families if family.name == name), families[0])

    def rounding_of(self, recipe: Recipe, family: Family | None) -> ActivationRounding | None:
        from edgellama.targets.onnx.numerics import ROUNDINGS

        return None if family is None else ROUNDINGS[family.name]

    def check_structure(self, path: Path, model: Llama, provenance: Provenance) -> list[Check]:
        with self.needs_extra():
            from edgellama.targets.onnx.structure import check_structure

        return check_structure(path, model, provenance)

    def listing(self, path: Path, model: Llama) -> Listing:
        with self.needs_extra():
            from edgellama.formats.onnx_listing import list_onnx
            from edgellama.formats.onnx_model import read_onnx

        return list_onnx(read_onnx(path))

    def describe(self, path: Path, model: Llama) -> dict[str, Any]:
        with self.needs_extra():
            from edgellama.targets.onnx.describe import describe_artifact

        return describe_artifact(path, model)

    def bound_manifest(self, path: Path) -> str | None:
        with self.needs_extra():
            from edgellama.formats.onnx_model import read_onnx
            from edgellama.targets.onnx.interface import MANIFEST_SHA256

        return read_onnx(path).metadata.get(MANIFEST_SHA256)

    def stored_codes(self, path: Path) -> Iterator[tuple[Tensor, Tensor]]:
        with self.needs_extra():
            from edgellama.targets.onnx.structure import stored_codes

        return stored_codes(path)

    def planned_adapter(self, pairs: Pairs, config: LlamaConfig, provenance: Provenance) -> StoredAdapter:
        with self.needs_extra():
            from edgellama.targets.onnx.adapters import planned_adapter

        return planned_adapter(pairs, provenance)

    def read_adapter(self, path: Path) -> StoredAdapter:
        with self.needs_extra():
            from edgellama.targets.onnx.adapters import read_adapter

        return read_adapter(path)
