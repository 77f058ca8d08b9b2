"""Alterations of a GGUF file: its keys, its codes and its scales, written again as edgellama writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgellama.export.gguf.lower import _add
from edgellama.formats.gguf import read_gguf
from edgellama.formats.gguf_blocks import BYTES, Codes, Halves, pack, unpack

Keys = dict[str, Any]
Edit = Callable[[Path], None]


def edit_keys(edit: Callable[[Keys], object]) -> Edit:
    return lambda path: _rewrite(path, edit, lambda tensors: None)


def without_tensor(name: str) -> Edit:
    return lambda path: _rewrite(path, lambda keys: None, lambda tensors: tensors.pop(name))


def edit_codes(name: str, edit: Callable[[Codes, Halves], tuple[Codes, Halves]]) -> Edit:
    """Alters codes int8 [rows, columns] and scales float16 [rows, blocks] of a tensor."""

    def alter(tensors: dict[str, Any]) -> None:
        kind, shape, raw = tensors[name]
        values, scales = unpack(kind, raw, shape)
        altered = edit(values.copy(), scales.copy())
        tensors[name] = kind, shape, pack(kind, *altered).reshape(-1)

    return lambda path: _rewrite(path, lambda keys: None, alter)


def _rewrite(path: Path, keys: Callable[[Keys], object], tensors: Callable[[dict[str, Any]], object]) -> None:
    file = read_gguf(path)
    metadata = {key: value for key, value in file.metadata.items() if key != "general.architecture"}
    stored = {
        name: (t.dtype, t.shape, np.array(file.parts[0][t.start : t.start + t.nbytes]))
        for name, t in file.tensors.items()
    }
    keys(metadata)
    tensors(stored)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, (kind, shape, raw) in stored.items():
        if kind in BYTES:
            rows = raw.reshape(shape[0], -1)
            writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, raw.view(np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
