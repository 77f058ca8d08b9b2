"""Manifest entry about a Core ML package, read from the file like the rest of the manifest."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgellama.formats.coreml_pte import extracted_package
from edgellama.formats.mlpackage import Feature, Function, MlPackage, read_mlpackage
from edgellama.formats.pte import read_pte
from edgellama.model.llama import Llama
from edgellama.targets.entries import StoredScheme, cache_bytes, scheme_rows

_CALLS = {"flexible": 256, "static": 32}  # tokens of a prefill call, for the memory of its logits


def describe_package(path: Path, model: Llama) -> dict[str, Any]:
    """The manifest's entry about the .mlpackage at `path`."""
    package = read_mlpackage(path)
    return {
        **_interface(package),
        "bytes": package.bytes,
        "methods": {function.name: None for function in package.functions},
        "requires": {
            "runtime": "coreml",
            # Core ML comes with the system. Its versions are those of the package's specification.
            "min_version": str(package.specification),
            "backends": ["CoreML"],
            "operators": sorted(package.operators),
            "min_os": package.minimum_os,
        },
        "quantization": _quantization(package),
        "memory": _memory(package, model, package.bytes),
    }


def describe_pte(path: Path, model: Llama) -> dict[str, Any]:
    """The manifest's entry about the .pte at `path`, which contains a package."""
    with extracted_package(path) as inside:
        package = read_mlpackage(inside)
    pte = read_pte(path)
    return {
        **_interface(package),
        "bytes": pte.bytes,
        "methods": dict(pte.methods),
        "requires": {
            "runtime": "executorch",
            "min_version": version("executorch").partition("+")[0],
            "backends": sorted(pte.backends),
            "operators": sorted(pte.operators),
            "min_os": package.minimum_os,
        },
        "quantization": _quantization(package),
        "memory": _memory(package, model, pte.bytes),
    }


def _interface(package: MlPackage) -> dict[str, Any]:
    first = _features(package.function(package.default_function))
    if len(package.functions) == 1:
        return first
    return first | {"functions": {f.name: _features(f) for f in package.functions}}


def _features(function: Function) -> dict[str, list[dict[str, Any]]]:
    return {
        "inputs": [_feature(x) for x in function.inputs],
        "outputs": [_feature(x) for x in function.outputs],
        "states": [_feature(x) for x in function.states],
    }


def _feature(feature: Feature) -> dict[str, Any]:
    """Names flexible sizes T and E, as edgellama.targets.coreml.interface does. Both have the same range."""
    ranges = [size for size in feature.shape if not isinstance(size, int)]
    names = iter(("T", "E"))
    shape = [size if isinstance(size, int) else next(names) for size in feature.shape]
    entry: dict[str, Any] = {"name": feature.name, "dtype": feature.dtype, "shape": shape}
    return entry | {"range": list(ranges[0])} if ranges else entry


def _quantization(package: MlPackage) -> list[dict[str, Any]]:
    """One entry per storage scheme of weights. Weights that functions share count once."""
    groups: dict[StoredScheme, list[int]] = {}
    for weight in package.weights:
        name = weight.scheme.partition(" ")[0]
        form = StoredScheme("weights", name, weight.bits, weight.group_size, "float16")
        groups.setdefault(form, []).append(weight.nbytes)
    return scheme_rows(groups)


def _memory(package: MlPackage, model: Llama, size: int) -> dict[str, int]:
    config = model.config
    weights = sum(weight.nbytes for weight in package.weights)
    cache = cache_bytes(model, value_bytes=2)
    rows = _CALLS["flexible" if package.functions[0].name == "main" else "static"]
    logits = 2 * rows * config.output_size
    return {"weights": weights, "kv_cache": cache, "peak_estimate": size + cache + logits}
