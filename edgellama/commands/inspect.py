"""Verb `inspect`: contents of a bundle, a checkpoint, a .pte, an .mlpackage, an .onnx or MLX weights, by bytes.

Text and JSON are views of one object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from math import isfinite, prod
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, is_bundle
from edgellama.bundle.reports import EXPORT_REPORT, EXPORT_SCHEMA
from edgellama.errors import BundleError, InputError, MissingDependencyError
from edgellama.files import read_json
from edgellama.host.find_checkpoint import find_checkpoint
from edgellama.report.metrics import HEADLINE

SCHEMA = "edgellama.inspect/1"
_TENSOR_KEYS = ("name", "dtype", "shape", "range")
_GROUP_KEYS = ("modules", "scheme", "group_size", "activations", "tensors", "bytes")
_REQUIRES_KEYS = ("runtime", "min_version", "min_os", "backends", "operators")
_ACCURACY_KEYS = ("verdict", "tokens", *HEADLINE)
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


def inspect(path: str | Path) -> dict[str, Any]:
    """Contents of a bundle, a checkpoint, a .pte, an .mlpackage, an ONNX or an MLX model: JSON data with a `kind`.

    A bundle with altered files is listed too, with `problems`. Raises InputError for anything that cannot
    be read.
    """
    path = find_checkpoint(path, weights=False)
    common = {"schema": SCHEMA, "path": str(path)}
    checkpoint = (path.is_file() and _is_gguf(path)) or any(
        (path / name).exists() for name in ("config.json", "params.json", "adapter_config.json")
    )
    if is_bundle(path) or (not checkpoint and (path / MANIFEST).exists()):
        return common | _bundle(Bundle.open(path))
    if checkpoint and (mlx := _mlx(path)) is not None:
        return common | {"kind": "mlx"} | mlx
    if checkpoint:
        return common | _checkpoint(path)
    if path.suffix.lower() == ".pte" and path.is_file():
        return common | _pte(path)
    if path.suffix.lower() == ".mlpackage":
        return common | {"kind": "mlpackage"} | _mlpackage(path)
    if path.suffix.lower() == ".onnx" or (path / "model.onnx").is_file():
        return common | {"kind": "onnx"} | _onnx(path)
    raise InputError(
        f"{path}: neither a bundle nor a checkpoint nor a .pte nor an .mlpackage nor an .onnx",
        remedy="Give a bundle (a directory that `edgellama export` wrote), a checkpoint (a Hugging Face directory with "
        "config.json, a .gguf file, or Meta's directory with params.json), a .pte file, an .mlpackage or an .onnx file.",
    )


def _is_gguf(path: Path) -> bool:
    """True by the ending, or by the first bytes: Ollama stores GGUF files without an ending."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF"


def _bundle(bundle: Bundle) -> dict[str, Any]:
    manifest, bad = bundle.manifest, bundle.problems_by_file()
    files = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    recipe = manifest["recipe"]
    return {
        "kind": "bundle",
        "name": manifest["name"],
        "bytes": sum(files.values()),
        "context_length": bundle.context_length,
        "problems": list(bad.values()),
        "artifacts": [
            {
                **_only(entry, ("target", "path", "bytes")),
                "memory": _only(entry["memory"], ("weights", "kv_cache", "peak_estimate")),
                "quantization": _with_shares([_only(row, _GROUP_KEYS) for row in entry["quantization"]]),
                "requires": _only(entry["requires"], _REQUIRES_KEYS),
                **{
                    k: _by_layer([_only(x, _TENSOR_KEYS) for x in entry[k]])
                    for k in ("inputs", "outputs", "states")
                },
            }
            for entry in manifest["artifacts"]
        ],
        "tensors": [] if EXPORT_REPORT in bad else _tensor_rows(bundle),
        "accuracy": {target: _only(h, _ACCURACY_KEYS) for target, h in manifest["accuracy"].items()},
        "recipe": _only(recipe, ("name", "summary", "algorithm"))
        | {"rules": [{"modules": rule["modules"], "scheme": _scheme(rule)} for rule in recipe["rules"]]},
        "source": manifest["source"],
        "model": _only(manifest["model"], bundle.config.to_dict()),
        "chat": manifest["chat"],
        **({"classifier": manifest["classifier"]} if "classifier" in manifest else {}),
        **({"adapters": _adapters(bundle)} if "adapters" in manifest else {}),
        "tools": manifest["tools"],
        "files": [{"file": n, "bytes": b, "as_exported": n not in bad} for n, b in _by_bytes(files)],
    }


def _adapters(bundle: Bundle) -> list[dict[str, Any]]:
    """A row for each adapter that is switched at run time, with the bytes of its files."""
    files = bundle.manifest["files"]
    return [
        {
            **_only(entry, ("name", "rank", "parameters", "sha256")),
            "linears": len(entry["modules"]),
            **{f"{t}_bytes": files[path]["bytes"] for t, path in entry["files"].items() if path in files},
        }
        for entry in bundle.manifest["adapters"]
    ]


def _tensor_rows(bundle: Bundle) -> list[dict[str, Any]]:
    """Rows from the export's report: tensors of one module with one scheme, with their lowest SQNR in dB.

    Empty if there is no report or it has another schema.
    """
    if EXPORT_REPORT not in bundle.manifest["files"]:
        return []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    try:
        report = read_json(bundle.path / EXPORT_REPORT)
        if report["schema"] != EXPORT_SCHEMA:
            return []
        for row in report["tensors"]:
            groups.setdefault((_module(row["name"]), str(row["scheme"])), []).append(row)
        rows = [
            {
                "module": module,
                "scheme": scheme,
                "tensors": len(group),
                "parameters": sum(prod(map(_count, row["shape"])) for row in group),
                "bytes": sum(_count(row["bytes"]) for row in group),
                "worst_sqnr_db": min(
                    (float(row["sqnr_db"]) for row in group if row["sqnr_db"] is not None), default=None
                ),
            }
            for (module, scheme), group in groups.items()
        ]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise BundleError(
            f"{bundle.path / EXPORT_REPORT}: not the report of an export ({error})",
            remedy="Export the bundle again.",
        ) from error
    return _with_shares(rows)


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**53:
        raise ValueError(f"a size is {value!r:.60}")
    return value


def _checkpoint(path: Path) -> dict[str, Any]:
    from edgellama.checkpoints import open_checkpoint

    opened = open_checkpoint(path, weights=False)
    config, tokenizer = opened.config, opened.tokenizer
    total = sum(info.nbytes for info in opened.infos.values())
    added = json.loads(tokenizer.files["tokenizer.json"]).get("added_tokens") or []
    tensors = [(name, info.dtype, prod(info.shape), info.nbytes) for name, info in opened.infos.items()]
    return {
        "kind": "checkpoint",
        "format": opened.format,
        "parameters": config.parameters,
        "bytes": total,
        "bits_per_weight": 8 * total / config.parameters,
        "license": opened.license,
        "license_files": sorted(opened.license_files),
        "hub": opened.hub.to_dict() if opened.hub else None,
        "notes": list(opened.notes),
        **({"codes": opened.given.to_dict()} if opened.given else {}),
        "dtypes": _grouped(("dtype",), (((dtype,), n, b) for _, dtype, n, b in tensors)),
        "modules": _grouped(("module",), (((_module(name),), n, b) for name, _, n, b in tensors)),
        "config": config.to_dict(),
        "tokenizer": {
            "tokens": tokenizer.size,
            "bytes": len(tokenizer.files["tokenizer.json"]),
            "chat_template": tokenizer.chat_template is not None,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "stops_at": [stop.text for stop in opened.stop_tokens],
            "stop_tokens": [
                {"token": stop.text, "id": stop.id, "named_by": ", ".join(stop.sources)}
                for stop in opened.stop_tokens
            ],
            "special_tokens": [str(token["content"]) for token in added if token.get("special")],
        },
        "files": [
            {"file": n, "bytes": b} for n, b in _by_bytes({f.name: f.stat().st_size for f in opened.files})
        ],
    }


def _pte(path: Path) -> dict[str, Any]:
    from edgellama.formats.pte import read_pte

    pte = read_pte(path)
    # The file stores equal bytes once, so the sum of the linears' sizes may be larger.
    pieces = {piece for x in pte.linears for piece in (x.data, x.scale_data, x.bias_data, x.less_data)}
    packages = _coreml_inside(path, pte.backends)
    weights = sum(map(len, pieces)) + sum(len(c.data) for c in pte.constants)
    weights += sum(package["weight_bytes"] for package in packages)
    return {
        "kind": "pte",
        "bytes": pte.bytes,
        "weight_bytes": weights,
        "weight_share": weights / pte.bytes,
        "planned_bytes": pte.planned_bytes,
        "linears": _grouped(
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
        "constants": _grouped(
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
        return [_mlpackage(package) for package in packages]


def _mlpackage(path: Path) -> dict[str, Any]:
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
        "weights": _grouped(("scheme",), (((w.scheme,), prod(w.shape), w.nbytes) for w in package.weights)),
        "operators": [{"operator": name, "calls": calls} for name, calls in package.operators.most_common()],
        "metadata": {k: v for k, v in package.metadata.items() if v},
        "user_defined": dict(package.user_defined),
    }


def _onnx(path: Path) -> dict[str, Any]:
    try:
        from edgellama.formats.onnx_model import read_onnx
        from edgellama.targets.onnx.describe import quantization
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{path}: reading an ONNX model needs the package {error.name!r}, which is not installed",
            remedy="pip install 'edgellama[onnx]'",
        ) from error
    file = read_onnx(path)
    rows = [_only(row, _GROUP_KEYS) for row in quantization(file)]
    return {
        "bytes": file.bytes,
        "model_bytes": file.path.stat().st_size,
        "weight_files": ", ".join(file.external_files),
        "ir_version": file.proto.ir_version,
        "producer": file.proto.producer_name,
        "opsets": [{"domain": domain, "version": version} for domain, version in file.opsets.items()],
        "inputs": _by_layer([_value(value) for value in file.inputs]),
        "outputs": _by_layer([_value(value) for value in file.outputs]),
        "weights": _with_shares(rows),
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


def _mlx(path: Path) -> dict[str, Any] | None:
    """Contents of a quantized MLX directory; None for any other checkpoint."""
    from edgellama.formats.mlx_model import is_mlx, read_mlx
    from edgellama.targets.mlx.describe import quantization

    if not is_mlx(path):
        return None
    file = read_mlx(path)
    tensors = [(_module(t.name), t.dtype, prod(t.shape), t.nbytes) for t in file.tensors.values()]
    return {
        "bytes": file.bytes,
        "weights": _with_shares([_only(row, _GROUP_KEYS) for row in quantization(file)]),
        "dtypes": _grouped(("dtype",), (((dtype,), count, size) for _, dtype, count, size in tensors)),
        "config": {k: v for k, v in sorted(file.config.items()) if not isinstance(v, (list, Mapping))},
        "metadata": dict(file.metadata),
    }


def _value(value: Any) -> dict[str, Any]:
    return {"name": value.name, "dtype": value.dtype, "shape": list(value.shape)}


def _by_layer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merges rows that differ only in the number of the layer in their name."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        name = re.sub(r"\.\d+\.", ".*.", row["name"])
        groups.setdefault((name, str(row | {"name": name})), []).append(row)
    return [group[0] | {"name": name} if len(group) > 1 else group[0] for (name, _), group in groups.items()]


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


def _only(data: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: data[key] for key in keys if key in data}


def _by_bytes(sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))


def _scheme(rule: Mapping[str, Any]) -> str:
    scheme = rule["scheme"]
    if scheme is None:
        return "float32"
    group = f"g{scheme['group_size']}" if scheme["group_size"] else "channel"
    return f"int{scheme['bits']} {group}" + (" a8" if scheme["int8_activations"] else "")


def _module(tensor: str) -> str:
    """Name of a module without its layer: `self_attn.q_proj` of `model.layers.3.self_attn.q_proj.weight`."""
    return re.sub(r"^model\.(layers\.\d+\.)?|\.(weight|bias)$", "", tensor)


def _grouped(
    labels: tuple[str, ...], tensors: Iterable[tuple[tuple[Any, ...], int, int]]
) -> list[dict[str, Any]]:
    """Sums tensors, given as (values, parameters, bytes), to rows of equal values under `labels`."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for values, parameters, size in tensors:
        empty = dict(zip(labels, values, strict=True)) | {"tensors": 0, "parameters": 0, "bytes": 0}
        row = rows.setdefault(values, empty)
        row["tensors"] += 1
        row["parameters"] += parameters
        row["bytes"] += size
    return _with_shares(list(rows.values()))


def _with_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, largest first, each with its share of all bytes."""
    total = sum(row["bytes"] for row in rows) or 1
    return [row | {"share": row["bytes"] / total} for row in sorted(rows, key=lambda row: -row["bytes"])]
