"""Target `xnnpack`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.targets.base import Activations, Target
from edgellama.targets.xnnpack.interface import longest_call
from edgellama.targets.xnnpack.storage import STORAGE

if TYPE_CHECKING:
    from torch import Tensor

    from edgellama.formats.listing import Listing
    from edgellama.model.activations import ActivationRounding
    from edgellama.model.config import LlamaConfig
    from edgellama.model.llama import Llama
    from edgellama.recipe import Recipe
    from edgellama.report import Check
    from edgellama.targets.provenance import Provenance


class XnnpackTarget(Target):
    """ExecuTorch's CPU backend: int8 activations per token, float32 between linears."""

    name = "xnnpack"
    summary = "ExecuTorch .pte for the CPU of Android and iOS devices, and Linux"
    artifact = "xnnpack/model.pte"
    storage = STORAGE
    packages = ("executorch",)
    options = ("kv_cache",)
    int8_groups = False
    kv_caches = ("float", "int8")
    activations = Activations.INT8_PER_TOKEN
    device_runtime = "executorch"
    device_backends = ("xnnpack",)
    copies = 0.0  # the weights of a delegate wait in a file
    assumed_floor = 0.03  # measured on 30 layers with int8 activations

    def arithmetic(self, model: Llama, recipe: Recipe) -> AbstractContextManager[None]:
        from edgellama.targets.xnnpack.numerics import xnnpack_numerics

        return xnnpack_numerics(model, recipe)

    def has_parts(self) -> bool:
        """True for the executorch whose delegates reach from one attention to the next."""
        from edgellama.host.executorch_versions import proven

        return proven()

    def rounding(self, recipe: Recipe) -> ActivationRounding:
        from edgellama.targets.xnnpack.numerics import rounding

        return rounding(recipe)

    def check_structure(self, path: Path, model: Llama, provenance: Provenance) -> list[Check]:
        from edgellama.targets.xnnpack.structure import check_structure

        return check_structure(path, model, provenance)

    def listing(self, path: Path, model: Llama) -> Listing:
        from edgellama.formats.pte_listing import list_pte
        from edgellama.targets.xnnpack.structure import constant_names

        return list_pte(path, constant_names(model))

    def describe(self, path: Path, model: Llama) -> dict[str, Any]:
        from edgellama.targets.xnnpack.describe import describe_artifact

        return describe_artifact(path, model)

    def bound_manifest(self, path: Path) -> str | None:
        from edgellama.targets.executorch import bound_manifest

        return bound_manifest(path)

    def stored_codes(self, path: Path) -> Iterator[tuple[Tensor, Tensor]]:
        from edgellama.targets.xnnpack.structure import stored_codes

        return stored_codes(path)

    def activation_floats(self, config: LlamaConfig, context_length: int) -> int:
        """ExecuTorch plans its buffers, and XNNPACK its workspace, for the longest call.

        Between delegates lie q, k, v, RoPE and the residual. Inside the largest delegate lie gate, up, their
        product and two rows.
        """
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        between = q + 2 * kv + 3 * hidden + 2 * config.head_dim
        return longest_call(context_length) * (between + 3 * inner + 2 * hidden) + config.output_size
