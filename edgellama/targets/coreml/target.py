"""Targets `coreml` and `coreml-pte`: one program in two containers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgellama.targets.base import FLOAT16_NOISE, Activations, Target
from edgellama.targets.coreml.storage import STORAGE

if TYPE_CHECKING:
    from torch import Tensor

    from edgellama.formats.listing import Listing
    from edgellama.model.config import LlamaConfig
    from edgellama.model.llama import Llama
    from edgellama.recipe import Recipe
    from edgellama.report import Check
    from edgellama.targets.provenance import Provenance


class CoremlTarget(Target):
    """Core ML: weights as codes, activations in float16."""

    name = "coreml"
    summary = "Core ML .mlpackage for iOS 18 and macOS 15, GPU or Neural Engine"
    artifact = "coreml/model.mlpackage"
    artifact_files: ClassVar[tuple[str, ...]] = (
        "Manifest.json",
        "Data/com.apple.CoreML/model.mlmodel",
        "Data/com.apple.CoreML/weights/weight.bin",
    )
    storage = STORAGE
    packages: ClassVar[tuple[str, ...]] = ("coremltools",)
    options = ("coreml_profile",)
    activations = Activations.FLOAT16
    device_runtime = "coreml"
    device_backends = ("coreml",)
    compute_bytes = 2
    all_logits = True
    interpreted_off_macos = True
    parity_kl = 1e-3  # the cost of float16
    noise = FLOAT16_NOISE
    assumed_floor = 1e-3
    stateful: ClassVar[bool] = True  # the cache is a state, not an input

    def check(self, config: LlamaConfig, recipe: Recipe, context_length: int) -> None:
        from edgellama.targets.coreml.limits import check_profile

        check_profile(config, recipe, context_length)

    def arithmetic(self, model: Llama, recipe: Recipe) -> AbstractContextManager[None]:
        from edgellama.targets.coreml.numerics import coreml_numerics

        return coreml_numerics(model, recipe)

    def exact_arithmetic(self, model: Llama, recipe: Recipe) -> AbstractContextManager[None]:
        from edgellama.targets.coreml.numerics import stored_numerics

        return stored_numerics(model, stateful=self.stateful)

    def check_structure(self, path: Path, model: Llama, provenance: Provenance) -> list[Check]:
        from edgellama.targets.coreml.structure import check_structure

        return check_structure(path, model, provenance)

    def listing(self, path: Path, model: Llama) -> Listing:
        from edgellama.formats.mlpackage_listing import list_mlpackage

        return list_mlpackage(path)

    def describe(self, path: Path, model: Llama) -> dict[str, Any]:
        from edgellama.targets.coreml.describe import describe_package

        return describe_package(path, model)

    def bound_manifest(self, path: Path) -> str | None:
        from edgellama.formats.mlpackage import read_mlpackage
        from edgellama.targets.coreml.interface import MANIFEST_SHA256

        return read_mlpackage(path).user_defined.get(MANIFEST_SHA256)

    def stored_codes(self, path: Path) -> Iterator[tuple[Tensor, Tensor]]:
        from edgellama.targets.coreml.structure import stored_codes

        return stored_codes(path)


class CoremlPteTarget(CoremlTarget):
    """The Core ML program inside an ExecuTorch .pte."""

    name = "coreml-pte"
    device_runtime = "executorch"
    summary = "ExecuTorch .pte with the Core ML delegate, for apps on Apple devices that use ExecuTorch"
    artifact = "coreml-pte/model.pte"
    artifact_files = ()
    packages = ("coremltools", "executorch")
    stateful = False

    def check_structure(self, path: Path, model: Llama, provenance: Provenance) -> list[Check]:
        from edgellama.targets.coreml.structure import check_pte_structure

        return check_pte_structure(path, model, provenance)

    def listing(self, path: Path, model: Llama) -> Listing:
        from edgellama.formats.coreml_pte import extracted_packages
        from edgellama.formats.mlpackage_listing import list_mlpackage
        from edgellama.formats.pte_listing import list_pte

        with extracted_packages(path) as packages:
            inside = [item for package in packages for item in list_mlpackage(package)]
        return [*list_pte(path), *inside]

    def describe(self, path: Path, model: Llama) -> dict[str, Any]:
        from edgellama.targets.coreml.describe import describe_pte

        return describe_pte(path, model)

    def bound_manifest(self, path: Path) -> str | None:
        from edgellama.targets.executorch import bound_manifest

        return bound_manifest(path)

    def stored_codes(self, path: Path) -> Iterator[tuple[Tensor, Tensor]]:
        from edgellama.targets.coreml.structure import stored_pte_codes

        return stored_pte_codes(path)
