"""Rows of `inspect`: tensors summed by what they share, with their parts of all bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

GROUP_KEYS = ("modules", "scheme", "group_size", "activations", "tensors", "bytes")


def only(data: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: data[key] for key in keys if key in data}


def by_bytes(sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))


def by_layer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merges rows that differ only in the number of the layer in their name."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        name = re.sub(r"\.\d+\.", ".*.", row["name"])
        groups.setdefault((name, str(row | {"name": name})), []).append(row)
    return [group[0] | {"name": name} if len(group) > 1 else group[0] for (name, _), group in groups.items()]


def module_without_layer(tensor: str) -> str:
    """Name of a module without its layer: `self_attn.q_proj` of `model.layers.3.self_attn.q_proj.weight`."""
    return re.sub(r"^model\.(layers\.\d+\.)?|\.(weight|bias)$", "", tensor)


def grouped(
    labels: tuple[str, ...], tensors: Iterable[tuple[tuple[Any, ...], int, int]]
) -> list[dict[str, Any]]:
    """Sums tensors, given as (values, parameters, bytes), to rows of equal values under `labels`."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for values, parameters, size in tensors:
        empty = dict(zip(labels, values, strict=True)) | {"tensors": 0, "parameters": 0, "bytes": 0}
        row = rows.setdefault(values, empty)
        row["tensors"] += 1
        row["parameters"] += parameters
        row["bytes"] += size
    return with_shares(list(rows.values()))


def with_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, largest first, each with its share of all bytes."""
    total = sum(row["bytes"] for row in rows) or 1
    return [row | {"share": row["bytes"] / total} for row in sorted(rows, key=lambda row: -row["bytes"])]
