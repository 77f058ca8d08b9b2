"""Adapters of target `gguf`: a GGUF file of type `adapter`, for `llama_adapter_lora_init` of llama.cpp.

llama.cpp multiplies the product of a linear by alpha / rank, where rank is that of the tensors. Here the factor is in
the second matrix, so alpha is the rank. Linears of a smaller rank are filled up with zeros.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.nn.functional as F

from edgellama.errors import BundleError, CheckpointError
from edgellama.formats.gguf import read_gguf
from edgellama.formats.gguf_names import ggml_name, is_rotated, permute
from edgellama.model.adapted import Pairs
from edgellama.targets.adapters import StoredAdapter
from edgellama.targets.gguf.interface import MANIFEST_SHA256
from edgellama.targets.provenance import Provenance

ALPHA = "adapter.lora.alpha"
DOWN, UP = ".lora_a", ".lora_b"  # after the name of the weight
_KINDS = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}


def planned_adapter(pairs: Pairs, head_dim: int, provenance: Provenance) -> StoredAdapter:
    """Content of the file of an adapter. The rows of q and k are in llama.cpp's order, as the weights' are."""
    rank = max((pair.rank for pair in pairs.values()), default=1)
    arrays: dict[str, np.ndarray] = {}
    for name, pair in pairs.items():
        missing = rank - pair.rank
        up = permute(pair.up, head_dim) if is_rotated(name) else pair.up
        weight = ggml_name(f"{name}.weight")
        arrays[weight + DOWN] = np.ascontiguousarray(F.pad(pair.down, (0, 0, 0, missing)).numpy())
        arrays[weight + UP] = np.ascontiguousarray(F.pad(up, (0, missing)).numpy())
    return StoredAdapter(arrays, provenance.manifest_sha256, {**_KINDS, ALPHA: float(rank)})


def read_adapter(path: Path) -> StoredAdapter:
    """Content of a file. Raises BundleError if it cannot be read."""
    try:
        file = read_gguf(path)
    except CheckpointError as error:
        raise BundleError(error.message, remedy="Export the bundle again.") from error
    arrays = {name: file.read(name).float().numpy() for name in file.tensors}
    settings = {key: file.metadata[key] for key in (*_KINDS, ALPHA) if key in file.metadata}
    return StoredAdapter(arrays, str(file.metadata.get(MANIFEST_SHA256)), settings)
