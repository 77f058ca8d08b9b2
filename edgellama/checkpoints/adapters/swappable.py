"""Adapters that a runtime can switch: plain products of two matrices beside linears of the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellama.checkpoints.adapters.adapter import Adapter
from edgellama.checkpoints.adapters.merge import EMBEDDING, HEAD, with_adapters
from edgellama.checkpoints.adapters.read import open_adapter
from edgellama.checkpoints.checkpoint import Checkpoint
from edgellama.errors import CheckpointError
from edgellama.host.adapter_files import AdapterPlace
from edgellama.model.adapted import Pair

FOLDER = "adapters"  # in a bundle


def swap_objections(adapter: Adapter) -> list[str]:
    """Reasons, in words, why no runtime can switch the adapter. Empty for plain LoRA and rsLoRA."""
    stretched = sorted(n for n, change in adapter.changes.items() if change.magnitude is not None)
    tables = sorted({EMBEDDING, HEAD} & (adapter.changes.keys() | adapter.tables.keys()))
    biases = sorted(n for n in adapter.saved if n.endswith(".bias"))
    whole = sorted(n for n in adapter.saved if not n.endswith(".bias"))
    reasons = {
        "DoRA gives rows a length of their own": stretched,
        "embedding and output layer have no inputs for a change": tables,
        "a bias was trained": biases,
        "a whole module was trained": whole,
    }
    return [f"{reason} ({names[0]})" for reason, names in reasons.items() if names]


@dataclass(frozen=True)
class Swappable:
    """An adapter that a bundle holds beside its base.

    Attributes:
        name: in the bundle.
        path: directory that it was read from.
        adapter: its content.
        merged: the base with the adapter merged, which is the reference of its quality.
        sha256: hash of the files that were read.
    """

    name: str
    path: Path
    adapter: Adapter
    merged: Checkpoint
    sha256: str

    @property
    def modules(self) -> list[str]:
        """Names of the linears that it changes, sorted."""
        return sorted(name.removesuffix(".weight") for name in self.adapter.changes)

    def pairs(self) -> dict[str, Pair]:
        """The products by the name of their linear, with the factor in the second matrix."""
        return pairs_of(self.adapter)

    def notes(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Notes about the adapter that are none about its base, `checkpoint`."""
        notes = tuple(note for note in self.merged.notes if note not in checkpoint.notes)
        if self.merged.tokenizer.files == checkpoint.tokenizer.files:
            return notes
        others = (note for note in notes if not note.startswith("tokenizer and chat template"))
        return (*others, "its own tokenizer or chat template is not used: a bundle has one, the base's")

    def to_dict(self, endings: Mapping[str, str]) -> dict[str, Any]:
        """The manifest's entry. endings: ends of the names of its files, by target."""
        return {
            "name": self.name,
            "layout": self.adapter.layout,
            "sha256": self.sha256,
            "base_sha256": self.merged.base_sha256(),
            "parameters": self.adapter.parameters,
            "rank": max(change.rank for change in self.adapter.changes.values()),
            "modules": self.modules,
            "files": {target: f"{FOLDER}/{self.name}{ending}" for target, ending in endings.items()},
        }


def open_swappables(checkpoint: Checkpoint, places: Mapping[str, Path]) -> tuple[Swappable, ...]:
    """The adapters of a bundle by name, in the order of `places`. Raises CheckpointError as `open_swappable`."""
    return tuple(open_swappable(checkpoint, path, name) for name, path in places.items())


def open_swappable(checkpoint: Checkpoint, path: Path, name: str = "adapter") -> Swappable:
    """The adapter in the directory `path`.

    Raises CheckpointError for an adapter that is no plain LoRA, or belongs to another base.
    """
    adapter = open_adapter(path)
    objections = swap_objections(adapter)
    if objections:
        raise CheckpointError(
            f"{path}: this adapter cannot be switched at run time: {'; '.join(objections)}",
            remedy=f"Merge it instead: --adapter {path}.",
        )
    place = AdapterPlace(path)
    return Swappable(name, path, adapter, with_adapters(checkpoint, [place]), place.sha256())


def pairs_of(adapter: Adapter) -> dict[str, Pair]:
    """The adapter's products by the name of their linear, with the factor in the second matrix."""
    return {
        name.removesuffix(".weight"): Pair(change.down, change.scale * change.up)
        for name, change in adapter.changes.items()
    }
