"""Adapters that a runtime can switch: plain products of two matrices beside linears of the decoder."""

from __future__ import annotations

from pathlib import Path

from edgellama.checkpoints.adapters.adapter import Adapter
from edgellama.checkpoints.adapters.merge import EMBEDDING, HEAD, with_adapters
from edgellama.checkpoints.adapters.read import open_adapter
from edgellama.checkpoints.checkpoint import Checkpoint
from edgellama.errors import CheckpointError
from edgellama.host.adapter_files import AdapterPlace
from edgellama.model.adapted import Pair, Pairs


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


def open_swappable(checkpoint: Checkpoint, path: Path) -> tuple[Adapter, Checkpoint]:
    """The adapter at `path`, and `checkpoint` with it merged, as the reference of its quality.

    Raises CheckpointError for an adapter that is no plain LoRA, or belongs to another base.
    """
    adapter = open_adapter(path)
    objections = swap_objections(adapter)
    if objections:
        raise CheckpointError(
            f"{path}: this adapter cannot be switched at run time: {'; '.join(objections)}",
            remedy=f"Merge it instead: --adapter {path}.",
        )
    return adapter, with_adapters(checkpoint, [AdapterPlace(path)])


def pairs_of(adapter: Adapter) -> Pairs:
    """The adapter's products by the name of their linear, with the factor in the second matrix."""
    return {
        name.removesuffix(".weight"): Pair(change.down, change.scale * change.up)
        for name, change in adapter.changes.items()
    }
