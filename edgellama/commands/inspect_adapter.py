"""Contents of an adapter's directory: what it changes, which base it wants, and what can be done with it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from edgellama.checkpoints.adapters import Adapter, open_adapter
from edgellama.checkpoints.adapters.swappable import swap_objections
from edgellama.commands.inspect import SCHEMA
from edgellama.host.adapter_files import AdapterPlace
from edgellama.targets import TARGETS


def inspect_adapter(path: str | Path) -> dict[str, Any]:
    """Contents of the adapter in the directory `path`: JSON data of kind `adapter`.

    Raises CheckpointError for an adapter that edgellama cannot merge.
    """
    place = AdapterPlace(Path(path))
    adapter = open_adapter(place.path)
    objections = swap_objections(adapter)
    able = [target.name for target in TARGETS.values() if target.adapter_ending is not None]
    changes = adapter.changes.values()
    linears = Counter(name.removesuffix(".weight").rpartition(".")[2] for name in adapter.changes)
    return {
        "schema": SCHEMA,
        "path": str(place.path),
        "kind": "adapter",
        "layout": adapter.layout,
        "base": adapter.base,
        "variant": _variant(adapter),
        "ranks": sorted({change.rank for change in changes}),
        "factors": sorted({round(change.scale, 6) for change in changes}),
        "layers": len({name.split(".")[2] for name in adapter.changes if name.startswith("model.layers.")}),
        "parameters": adapter.parameters,
        "bytes": place.weights_file().stat().st_size,
        "sha256": place.sha256(),
        "linears": [{"linear": name, "count": count} for name, count in sorted(linears.items())],
        "trained_whole": sorted(adapter.saved),
        "merged": "--adapter, for every target",
        "switched": f"--adapters NAME=DIR, for {' and '.join(able)}" if not objections else "no: merge it",
        "objections": objections,
    }


def _variant(adapter: Adapter) -> str:
    """Method of the adapter in words. The factor tells how LoRA and rsLoRA differ."""
    if not adapter.changes:
        return "whole modules"
    stretched = sum(change.magnitude is not None for change in adapter.changes.values())
    kind = "DoRA" if stretched else "LoRA"
    return f"{kind} and whole modules" if adapter.saved else kind
