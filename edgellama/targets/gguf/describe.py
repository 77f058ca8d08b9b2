"""Manifest entry about a GGUF file, read from the file like the rest of the manifest."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgellama.formats.gguf import GgufFile, read_gguf
from edgellama.formats.gguf_blocks import BLOCK
from edgellama.formats.listing import Item, Listing, digest
from edgellama.model.llama import Llama
from edgellama.targets.entries import StoredScheme, cache_bytes, scheme_rows

_BITS = {"Q4_0": 4, "Q8_0": 8}
_SCHEMES = {"Q4_0": "int4", "Q8_0": "int8", "F32": "float32"}
CACHE_BYTES = 2  # of a key or value


def describe_artifact(path: Path, model: Llama) -> dict[str, Any]:
    """The manifest's entry about the file at `path`."""
    file, config = read_gguf(path), model.config
    cache = cache_bytes(model, CACHE_BYTES)
    size, rows = path.stat().st_size, quantization(file)
    weights = sum(row["bytes"] for row in rows)
    return {
        "bytes": size,
        # Of llama_decode, beside positions that go on by one.
        "inputs": [{"name": "token", "dtype": "int32", "shape": ["T"], "range": [1, model.context_length]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [1, config.vocab_size]}],
        "states": [],
        "methods": {},
        "requires": {
            "runtime": "llama.cpp",
            "min_version": version("xllamacpp"),
            "backends": ["CPU"],
            "operators": [],
            "min_os": {},
        },
        "quantization": rows,
        "memory": {
            "weights": weights,
            "kv_cache": cache,
            # llama.cpp arranges a copy of the quantized weights for the processor, beside the mapped file.
            "peak_estimate": size + weights + cache + 4 * config.vocab_size,
        },
    }


def quantization(file: GgufFile) -> list[dict[str, Any]]:
    """One entry per type of weights. A table that is looked up and multiplied is listed under the product."""
    tied = "output.weight" not in file.tensors
    groups: dict[StoredScheme, list[int]] = {}
    for name, tensor in file.tensors.items():
        if len(tensor.shape) < 2:
            continue
        modules = "embedding" if name == "token_embd.weight" and not tied else "linear"
        kind, block = tensor.dtype, tensor.dtype in _BITS
        activations = "int8" if block and modules == "linear" else "float32"
        form = StoredScheme(
            modules, _SCHEMES.get(kind, kind), _BITS.get(kind, 32), BLOCK if block else None, activations
        )
        groups.setdefault(form, []).append(tensor.nbytes)
    return scheme_rows(groups)


def listing(path: Path) -> Listing:
    """Keys and tensors of the file, each tensor by its content. Offsets are left out."""
    file = read_gguf(path)
    items = [
        Item(f"key {key}", "key", {"name": key, "value": repr(value)}) for key, value in file.metadata.items()
    ]
    for name, tensor in file.tensors.items():
        raw = file.parts[tensor.part][tensor.start : tensor.start + tensor.nbytes]
        kind = f"{tensor.dtype} {list(tensor.shape)}"
        fields = {"name": name, "type and shape": kind, "content": digest(raw.data)}
        items.append(Item(f"tensor {name}", "tensor", fields))
    return items
