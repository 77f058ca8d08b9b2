"""Listing of an MLX directory: settings, metadata, and tensors by content."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch

from edgellama.formats.listing import Item, Listing, digest
from edgellama.formats.mlx_model import MlxFile


def list_mlx(file: MlxFile) -> Listing:
    """The listing of a model. The order of tensors in the file is left out."""
    return list(_items(file))


def _items(file: MlxFile) -> Iterator[Item]:
    for key, value in sorted(file.config.items()):
        yield Item(f"config.json: {key}", "setting", {"value": json.dumps(value, sort_keys=True)})
    for key, text in sorted(file.metadata.items()):
        yield Item(f"metadata {key}", "metadata", {"key": key, "value": text})
    for name, stored in sorted(file.tensors.items()):
        content = digest(file.tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
        kind = f"{stored.dtype} {list(stored.shape)}"
        yield Item(f"tensor {name!r}", "tensor", {"name": name, "type and shape": kind, "content": content})
