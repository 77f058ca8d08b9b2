"""Manifest entry about an ONNX model, read from the files like the rest of the manifest."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgellama.formats.onnx_model import OnnxFile, Value, read_onnx
from edgellama.formats.onnx_weights import weights_of
from edgellama.model.llama import Llama
from edgellama.targets.entries import StoredScheme, cache_bytes, scheme_rows


def describe_artifact(path: Path, model: Llama) -> dict[str, Any]:
    """The manifest's entry about the model in the directory `path`."""
    file, config = read_onnx(path), model.config
    cache = cache_bytes(model, value_bytes=4)
    rows = quantization(file)
    return {
        "bytes": file.bytes,
        "inputs": [_tensor(value, model) for value in file.inputs],
        "outputs": [_tensor(value, model) for value in file.outputs],
        "states": [],
        "methods": {},
        "requires": {
            "runtime": "onnxruntime",
            "min_version": version("onnxruntime"),
            "backends": ["CPU"],
            "operators": sorted(file.operators),
            "min_os": {},
        },
        "quantization": rows,
        "memory": {
            "weights": sum(row["bytes"] for row in rows),
            "kv_cache": cache,
            # ONNX Runtime packs its own copy of every quantized weight, beside the mapped file.
            "peak_estimate": file.bytes + sum(row["bytes"] for row in rows) + cache + 4 * config.output_size,
        },
    }


def quantization(file: OnnxFile) -> list[dict[str, Any]]:
    """One entry per storage scheme of weights. Weights that operators share count once."""
    groups: dict[StoredScheme, list[int]] = {}
    # A table that is both looked up and multiplied is listed under the product, which comes last.
    weights = {
        (place if (place := file.place(w.values))[0] else w.values): w for w in weights_of(file).values()
    }
    for weight in weights.values():
        scheme = weight.scheme.partition(" ")[0]
        level = weight.node.attributes.get("accuracy_level", 0)
        activations = "int8" if level == 4 else "float32"
        modules = "embedding" if weight.node.operator.startswith("Gather") else "linear"
        form = StoredScheme(modules, scheme, weight.bits, weight.group_size, activations)
        groups.setdefault(form, []).append(weight.nbytes(file))
    return scheme_rows(groups)


def _tensor(value: Value, model: Llama) -> dict[str, Any]:
    """Entry of an input or output.

    The sizes T, P, E and S vary up to the context, P from 0, the others from 1.
    """
    entry: dict[str, Any] = {"name": value.name, "dtype": value.dtype, "shape": list(value.shape)}
    varies = [size for size in value.shape if isinstance(size, str)]
    return entry | {"range": [0 if "P" in varies else 1, model.context_length]} if varies else entry
