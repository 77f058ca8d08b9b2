"""Manifest entry about an MLX directory, read from its files like the rest of the manifest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from edgellama.formats.mlx_model import MlxFile, read_mlx
from edgellama.model.llama import Llama
from edgellama.targets.entries import StoredScheme, cache_bytes, scheme_rows

PROVEN = "0.32.4"  # MLX whose CPU backend the gate was proven with
MIN_OS = {"ios": "17", "macos": "14"}  # of MLX Swift


def describe_artifact(path: Path, model: Llama) -> dict[str, Any]:
    """The manifest's entry about the model in the directory `path`."""
    file, config = read_mlx(path), model.config
    cache = cache_bytes(model, value_bytes=2)
    rows = quantization(file)
    weights = sum(tensor.nbytes for tensor in file.tensors.values())
    return {
        "bytes": file.bytes,
        "inputs": [
            {"name": "inputs", "dtype": "int32", "shape": [1, "T"], "range": [1, model.context_length]}
        ],
        "outputs": [
            {"name": "logits", "dtype": _dtype(file), "shape": [1, "T", config.vocab_size]},
        ],
        "states": [],
        "methods": {},
        "requires": {
            "runtime": "mlx",
            "min_version": PROVEN,
            "backends": ["Metal"],
            "operators": [],
            "min_os": MIN_OS,
        },
        "quantization": rows,
        "memory": {
            "weights": weights,
            "kv_cache": cache,
            "peak_estimate": file.bytes + cache + 2 * config.vocab_size,
        },
    }


def quantization(file: MlxFile) -> list[dict[str, Any]]:
    """One entry per storage scheme of weights with two dimensions."""
    groups: dict[StoredScheme, list[int]] = {}
    for name, tensor in file.tensors.items():
        module, _, part = name.rpartition(".")
        if part != "weight" or len(tensor.shape) != 2:
            continue
        modules, size = "embedding" if module.endswith("embed_tokens") else "linear", tensor.nbytes
        if module in file.quantized:
            group_size, bits = file.layout(module)
            size += sum(
                file.tensors[f"{module}.{p}"].nbytes
                for p in ("scales", "biases")
                if f"{module}.{p}" in file.tensors
            )
            form = StoredScheme(modules, f"int{bits}", bits, group_size, _dtype(file))
        else:
            width = 8 * tensor.nbytes // max(math.prod(tensor.shape), 1)
            form = StoredScheme(modules, tensor.dtype, width, None, _dtype(file))
        groups.setdefault(form, []).append(size)
    return scheme_rows(groups)


def _dtype(file: MlxFile) -> str:
    """Dtype of the final norm, which MLX computes in."""
    norm = file.tensors.get("model.norm.weight")
    return "float16" if norm is None else norm.dtype
