"""Parts of a manifest's entry about an artifact that several formats have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgellama.model.llama import Llama


@dataclass(frozen=True)
class StoredScheme:
    """Form in which weights are stored. `modules` is `linear` or `embedding`, `activations` their dtype."""

    modules: str
    scheme: str
    bits: int
    group_size: int | None
    activations: str


def scheme_rows(sizes: Mapping[StoredScheme, Sequence[int]]) -> list[dict[str, Any]]:
    """A row for each form, in order. sizes: bytes of every weight that has it."""
    return [
        {**vars(form), "tensors": len(nbytes), "bytes": sum(nbytes)}
        for form, nbytes in sorted(sizes.items(), key=lambda item: str(tuple(vars(item[0]).values())))
    ]


def cache_bytes(model: Llama, value_bytes: int) -> int:
    """Bytes of the keys and values of a whole context. value_bytes: of one number."""
    config = model.config
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * value_bytes * heads * model.context_length * config.head_dim
