"""Manifest entry about a .pte, read from it: inputs and outputs, requirements, bytes by scheme, memory."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgellama.formats.pte import PteFile, read_pte
from edgellama.model.llama import Llama
from edgellama.targets.entries import StoredScheme, scheme_rows
from edgellama.targets.xnnpack.interface import longest_call

INT8_ATTENTION = "llama::custom_quantized_sdpa.out"
_BITS = {"int4": 4, "int8": 8, "float32": 32}


def describe_artifact(path: Path, model: Llama) -> dict[str, Any]:
    """The manifest's entry about the .pte at `path`, read from the file itself."""
    pte, config = read_pte(path), model.config
    weights = sum(linear.nbytes for linear in pte.linears) + sum(len(c.data) for c in pte.constants)
    # float32, or int8 with a float32 scale and an int8 zero point per head
    head = config.head_dim + 5 if INT8_ATTENTION in pte.operators else 4 * config.head_dim
    longest = longest_call(model.context_length)
    cache = 2 * head * config.num_hidden_layers * model.context_length * config.num_key_value_heads
    return {
        "bytes": pte.bytes,
        "inputs": [
            {"name": "tokens", "dtype": "int64", "shape": [1, "T"], "range": [1, longest]},
            {"name": "input_pos", "dtype": "int64", "shape": [1]},
        ],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [1, config.output_size]}],
        "states": [],
        "methods": dict(pte.methods),
        "requires": {
            "runtime": "executorch",
            "min_version": version("executorch").partition("+")[0],
            "backends": sorted(pte.backends),
            "operators": sorted(pte.operators),
            "min_os": {"android": "API 23", "ios": "17"},
        },
        "quantization": _quantization(pte),
        "memory": {
            "weights": weights,
            "kv_cache": cache,
            # XNNPACK repacks every weight at load time. The planned buffers hold the cache and the
            # activations.
            "peak_estimate": pte.bytes + sum(linear.nbytes for linear in pte.linears) + pte.planned_bytes,
        },
    }


def _quantization(pte: PteFile) -> list[dict[str, Any]]:
    """One entry per storage scheme of weights: linears and the embedding table."""
    groups: dict[StoredScheme, list[int]] = {}
    for linear in pte.linears:
        activations = "int8" if linear.int8_activations else "float32"
        form = StoredScheme("linear", linear.weight, _BITS[linear.weight], linear.group_size, activations)
        groups.setdefault(form, []).append(linear.nbytes)
    tables = [c for c in pte.constants if c.dtype == "char"]
    if tables:
        scales = sum(len(c.data) for c in pte.constants if c.shape == (tables[0].shape[0],))
        groups[StoredScheme("embedding", "int8", _BITS["int8"], None, "float32")] = [
            len(tables[0].data) + scales
        ]
    return scheme_rows(groups)
