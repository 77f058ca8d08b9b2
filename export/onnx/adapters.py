"""Writer of adapters for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from edgellama.formats.onnx_adapter import write_onnx_adapter
from edgellama.targets.adapters import StoredAdapter


def write_adapter(adapter: StoredAdapter, path: Path) -> None:
    """Writes the content to the `.onnx_adapter` file `path`."""
    write_onnx_adapter(path, adapter.arrays, int(adapter.base))
