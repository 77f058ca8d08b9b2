"""Writer of adapters for llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf

from edgellama.targets.adapters import StoredAdapter
from edgellama.targets.gguf.interface import MANIFEST_SHA256


def write_adapter(adapter: StoredAdapter, path: Path) -> None:
    """Writes the content to the GGUF file `path`."""
    settings = dict(adapter.settings)
    writer = gguf.GGUFWriter(path, str(settings.pop("general.architecture")))
    for key, value in settings.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    writer.add_string(MANIFEST_SHA256, adapter.base)
    for name, array in adapter.arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
