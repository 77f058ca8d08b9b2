"""Target `gguf`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.targets.base import Activations, Target, tool_versions
from edgellama.targets.gguf.storage import STORAGE

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


class GgufTarget(Target):
    """llama.cpp: Q4_0 and Q8_0 weights, int8 activations in blocks of 32, a float16 KV cache."""

    name = "gguf"
    summary = "GGUF for llama.cpp, llama.rn, Ollama, LM Studio, GenieX: Android, iOS, desktop; one file"
    artifact = "gguf/model.gguf"
    copies = 0.3  # tensors are written one by one, and the largest is the table
    holds_tokenizer = True
    storage = STORAGE
    packages = ("gguf", "xllamacpp")
    extra = "gguf"
    activations = Activations.Q8_0
    compute_bytes = 2
    device_runtime = "llama.cpp"
    device_backends = ("cpu", "metal", "opencl", "vulkan", "hexagon")
    adapter_ending = ".gguf"
    parity_kl = 1e-3
    assumed_floor = 0.03

    def check(self, config: LlamaConfig, recipe: Recipe, context_length: int) -> None:
        from edgellama.targets.gguf.limits import check_blocks

        with self.needs_extra():
            tool_versions([self])
        check_blocks(config, recipe)

    def arithmetic(self, model: Llama, recipe: Recipe) -> AbstractContextManager[None]:
        from edgellama.targets.gguf.numerics import gguf_numerics

        return gguf_numerics(model)

    def rounding(self, recipe: Recipe) -> ActivationRounding | None:
        from edgellama.targets.gguf.numerics import ROUNDING

        return ROUNDING

    def activation_floats(self, config: LlamaConfig, context_length: int) -> int:
        return 2 * super().activation_floats(config, context_length)  # float32, beside a float16 cache

    def check_structure(self, path: Path, model: Llama, provenance: Provenance) -> list[Check]:
        from edgellama.targets.gguf.structure import check_structure

        return check_structure(path, model, provenance)

    def listing(self, path: Path, model: Llama) -> Listing:
        from edgellama.targets.gguf.describe import listing

        return listing(path)

    def describe(self, path: Path, model: Llama) -> dict[str, Any]:
        from edgellama.targets.gguf.describe import describe_artifact

        with self.needs_extra():
            return describe_artifact(path, model)

    def bound_manifest(self, path: Path) -> str | None:
        from edgellama.formats.gguf import read_gguf
        from edgellama.targets.gguf.interface import MANIFEST_SHA256

        return read_gguf(path).metadata.get(MANIFEST_SHA256)

    def tokenizer_entries(self, path: Path) -> Mapping[str, Any]:
        from edgellama.formats.gguf import read_gguf
        from edgellama.targets.gguf.interface import TOKENIZER

        return {k: v for k, v in read_gguf(path).metadata.items() if k.startswith(TOKENIZER)}

    def stored_codes(self, path: Path) -> Iterator[tuple[Tensor, Tensor]]:
        from edgellama.targets.gguf.structure import stored_codes

        return stored_codes(path)

    def planned_adapter(self, pairs: Pairs, config: LlamaConfig, provenance: Provenance) -> StoredAdapter:
        with self.needs_extra():
            from edgellama.targets.gguf.adapters import planned_adapter

        return planned_adapter(pairs, config.head_dim, provenance)

    def read_adapter(self, path: Path) -> StoredAdapter:
        with self.needs_extra():
            from edgellama.targets.gguf.adapters import read_adapter

        return read_adapter(path)
