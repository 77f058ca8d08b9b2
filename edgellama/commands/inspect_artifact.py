"""Contents of an artifact: a .pte, an .mlpackage, an ONNX model or a directory of MLX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite, prod
from pathlib import Path
from typing import Any

from edgellama.commands.inspect_rows import (
    GROUP_KEYS,
    by_layer,
    grouped,
    module_without_layer,
    only,
    with_shares,
)
from edgellama.errors import MissingDependencyError

_DTYPES = {  # ExecuTorch uses the names of C
    "byte": "uint8",
    "char": "int8",
    "short": "int16",
    "int": "int32",
    "long": "int64",
    "half": "float16",
    "float": "float32",
    "double": "float64",
}


def inspect_pte(path: Path) -> dict[str, Any]:
    """Contents of a .pte: JSON data. Raises BundleError for a damaged file."""
    from edgellama.formats.pte import read_pte

    pte = read_pte(path)
    # The file stores equal bytes once, so the sum of the linears' sizes may be larger.
    pieces = {piece for x in pte.linears for piece in (x.data, x.scale_data, x.bias_data, x.less_data)}
    packages = _coreml_inside(path, pte.backends)
    weights = sum(map(len, pieces)) + sum(len(c.data) for c in pte.constants)
    weights += sum(package["weight_bytes"] for package in packages)
    return {
        "bytes": pte.bytes,
        "weight_bytes": weights,
        "weight_share": weights / pte.bytes,
        "planned_bytes": pte.planned_bytes,
        "linears": grouped(
            ("scheme", "group_size", "activations"),
            (
                (
                    (x.weight, x.group_size, "int8" if x.int8_activations else "float32"),
                    prod(x.shape),
                    x.nbytes,
                )
                for x in pte.linears
            ),
        ),
        "constants": grouped(
            ("dtype",),
            (((_DTYPES.get(c.dtype, c.dtype),), prod(c.shape), len(c.data)) for c in pte.constants),
        ),
        "delegates": [{"backend": name, "calls": calls} for name, calls in pte.backends.items()],
        "operators": [{"operator": name, "calls": calls} for name, calls in pte.operators.items()],
        "methods": [{"method": name, "value": _json_value(value)} for name, value in pte.methods.items()],
        **({"coreml": packages} if packages else {}),
    }


def _coreml_inside(path: Path, backends: Iterable[str]) -> list[dict[str, Any]]:
    """Packages in a .pte that has the Core ML delegate."""
    from edgellama.formats.coreml_pte import BACKEND, extracted_packages

    if BACKEND not in backends:
        return []
    with extracted_packages(path) as packages:
        return [inspect_mlpackage(package) for package in packages]


def inspect_mlpackage(path: Path) -> dict[str, Any]:
    """Contents of an .mlpackage: JSON data. Raises BundleError for a damaged one."""
    from edgellama.formats.mlpackage import read_mlpackage

    package = read_mlpackage(path)
    return {
        "bytes": package.bytes,
        "model_bytes": package.model_bytes,
        "weight_bytes": package.weight_bytes,
        "specification_version": package.specification,
        "minimum_os": package.minimum_os,
        "default_function": package.default_function,
        "functions": [
            {
                "function": f.name,
                "opset": f.opset,
                "operators": sum(op.type != "const" for op in f.operations),
                "inputs": ", ".join(map(_declared, f.inputs)),
                "outputs": ", ".join(map(_declared, f.outputs)),
                "states": ", ".join(map(_declared, f.states)),
            }
            for f in package.functions
        ],
        "weights": grouped(("scheme",), (((w.scheme,), prod(w.shape), w.nbytes) for w in package.weights)),
        "operators": [{"operator": name, "calls": calls} for name, calls in package.operators.most_common()],
        "metadata": {k: v for k, v in package.metadata.items() if v},
        "user_defined": dict(package.user_defined),
    }


def inspect_onnx(path: Path) -> dict[str, Any]:
    """Contents of an ONNX model: JSON data. Raises MissingDependencyError without the extra."""
    try:
        from edgellama.formats.onnx_model import read_onnx
        from edgellama.targets.onnx.describe import quantization
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{path}: reading an ONNX model needs the package {error.name!r}, which is not installed",
            remedy="pip install 'edgellama[onnx]'",
        ) from error
    file = read_onnx(path)
    rows = [only(row, GROUP_KEYS) for row in quantization(file)]
    return {
        "bytes": file.bytes,
        "model_bytes": file.path.stat().st_size,
        "weight_files": ", ".join(file.external_files),
        "ir_version": file.proto.ir_version,
        "producer": file.proto.producer_name,
        "opsets": [{"domain": domain, "version": version} for domain, version in file.opsets.items()],
        "inputs": by_layer([_value(value) for value in file.inputs]),
        "outputs": by_layer([_value(value) for value in file.outputs]),
        "weights": with_shares(rows),
        "operators": [
            {
                "domain": name.rpartition("::")[0] or "ai.onnx",
                "operator": name.rpartition("::")[2],
                "calls": calls,
            }
            for name, calls in file.operators.most_common()
        ],
        "metadata": file.metadata,
    }


def inspect_mlx(path: Path) -> dict[str, Any] | None:
    """Contents of a quantized MLX directory; None for any other checkpoint."""
    from edgellama.formats.mlx_model import is_mlx, read_mlx
    from edgellama.targets.mlx.describe import quantization

    if not is_mlx(path):
        return None
    file = read_mlx(path)
    tensors = [
        (module_without_layer(t.name), t.dtype, prod(t.shape), t.nbytes) for t in file.tensors.values()
    ]
    return {
        "bytes": file.bytes,
        "weights": with_shares([only(row, GROUP_KEYS) for row in quantization(file)]),
        "dtypes": grouped(("dtype",), (((dtype,), count, size) for _, dtype, count, size in tensors)),
        "config": {k: v for k, v in sorted(file.config.items()) if not isinstance(v, (list, Mapping))},
        "metadata": dict(file.metadata),
    }


def _value(value: Any) -> dict[str, Any]:
    return {"name": value.name, "dtype": value.dtype, "shape": list(value.shape)}


def _declared(feature: Any) -> str:
    """Text such as `inputIds int32 [1, 1..2048]`, or enumerated shapes. An output may declare no shape."""
    sizes = [str(n) if isinstance(n, int) else f"{n[0]}..{n[1]}" for n in feature.shape]
    shapes = " or ".join(str(list(shape)) for shape in feature.shapes) or f"[{', '.join(sizes)}]"
    return f"{feature.name} {feature.dtype}" + (f" {shapes}" if sizes else "")


def _json_value(value: Any) -> Any:
    """The value of a method. NaN and infinity become strings, because JSON has no number for them."""
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value
