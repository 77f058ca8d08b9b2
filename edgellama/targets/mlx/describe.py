"""Manifest entry about an MLX directory, read from its files like the rest of the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgellama.formats.mlx_model import MlxFile, read_mlx
from edgellama.model.llama import Llama

PROVEN = "0.32.4"  # MLX whose CPU backend the gate was proven with
MIN_OS = {"ios": "17", "macos": "14"}  # of MLX Swift


def describe_artifact(path: Path, model: Llama) -> dict[str, Any]:
    """The manifest's entry about the model in the directory `path`."""
    file, config = read_mlx(path), model.config
    cache = (
        2 * 2 * config.num_hidden_layers * model.context_length * config.num_key_value_heads * config.head_dim
    )
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
    groups: dict[tuple[str, str, int, int | None, str], list[int]] = {}
    for name, tensor in file.tensors.items():
        module, _, part = name.rpartition(".")
        if part != "weight" or len(tensor.shape) != 2:
            continue
        key: tuple[str, str, int, int | None, str]
        modules, size = "embedding" if module.endswith("embed_tokens") else "linear", tensor.nbytes
        if module in file.quantized:
            group_size, bits = file.layout(module)
            size += sum(
                file.tensors[f"{module}.{p}"].nbytes
                for p in ("scales", "biases")
                if f"{module}.{p}" in file.tensors
            )
            key = (modules, f"int{bits}", bits, group_size, _dtype(file))
        else:
            key = (modules, tensor.dtype, 8 * tensor.nbytes // _count(tensor.shape), None, _dtype(file))
        groups.setdefault(key, []).append(size)
    return [
        {
            "modules": modules,
            "scheme": scheme,
            "bits": bits,
            "group_size": group,
            "activations": activations,
            "tensors": len(sizes),
            "bytes": sum(sizes),
        }
        for (modules, scheme, bits, group, activations), sizes in sorted(groups.items(), key=str)
    ]


def _dtype(file: MlxFile) -> str:
    """Dtype of the final norm, which MLX computes in."""
    norm = file.tensors.get("model.norm.weight")
    return "float16" if norm is None else norm.dtype


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return max(count, 1)
