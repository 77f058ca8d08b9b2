"""Adapters of target `onnx`: an `.onnx_adapter` holds the values of the graph's optional inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgellama.formats.onnx_adapter import read_onnx_adapter
from edgellama.model.adapted import Pairs
from edgellama.targets.adapters import StoredAdapter
from edgellama.targets.onnx.interface import ADAPTER_DOWN, ADAPTER_UP, base_number
from edgellama.targets.provenance import Provenance


def planned_adapter(pairs: Pairs, provenance: Provenance) -> StoredAdapter:
    """Content of the file of an adapter. Matrices are transposed, because the graph multiplies from the left."""
    arrays: dict[str, np.ndarray] = {}
    for name, pair in pairs.items():
        arrays[ADAPTER_DOWN.format(name)] = np.ascontiguousarray(pair.down.T.numpy())
        arrays[ADAPTER_UP.format(name)] = np.ascontiguousarray(pair.up.T.numpy())
    return StoredAdapter(arrays, str(base_number(provenance.manifest_sha256)))


def read_adapter(path: Path) -> StoredAdapter:
    """Content of a file. Raises BundleError if it cannot be read."""
    arrays, number = read_onnx_adapter(path)
    return StoredAdapter(arrays, str(number))
