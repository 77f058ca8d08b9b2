"""Verb `inspect`: contents of a bundle, a checkpoint, a .pte, an .mlpackage, an .onnx or MLX weights, by bytes.

Text and JSON are views of one object.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, is_bundle
from edgellama.commands.inspect_artifact import inspect_mlpackage, inspect_mlx, inspect_onnx, inspect_pte
from edgellama.commands.inspect_bundle import inspect_bundle
from edgellama.commands.inspect_rows import by_bytes, grouped, module_without_layer
from edgellama.errors import InputError
from edgellama.host.find_checkpoint import find_checkpoint

SCHEMA = "edgellama.inspect/1"


def inspect(path: str | Path) -> dict[str, Any]:
    """Contents of a bundle, a checkpoint, a .pte, an .mlpackage, an ONNX or an MLX model: JSON data with a `kind`.

    A bundle with altered files is listed too, with `problems`. Raises InputError for anything that cannot
    be read.
    """
    path = find_checkpoint(path, weights=False)
    kind, contents = _contents(path)
    return {"schema": SCHEMA, "path": str(path), "kind": kind} | contents


def _contents(path: Path) -> tuple[str, dict[str, Any]]:
    """Kind and contents of whatever lies at `path`."""
    checkpoint = (path.is_file() and _is_gguf(path)) or any(
        (path / name).exists() for name in ("config.json", "params.json", "adapter_config.json")
    )
    if is_bundle(path) or (not checkpoint and (path / MANIFEST).exists()):
        return "bundle", inspect_bundle(Bundle.open(path))
    if checkpoint and (mlx := inspect_mlx(path)) is not None:
        return "mlx", mlx
    if checkpoint:
        return "checkpoint", _checkpoint(path)
    if path.suffix.lower() == ".pte" and path.is_file():
        return "pte", inspect_pte(path)
    if path.suffix.lower() == ".mlpackage":
        return "mlpackage", inspect_mlpackage(path)
    if path.suffix.lower() == ".onnx" or (path / "model.onnx").is_file():
        return "onnx", inspect_onnx(path)
    raise InputError(
        f"{path}: neither a bundle nor a checkpoint nor a .pte nor an .mlpackage nor an .onnx",
        remedy="Give a bundle (a directory that `edgellama export` wrote), a checkpoint (a Hugging Face directory with "
        "config.json, a .gguf file, or Meta's directory with params.json), a .pte file, an .mlpackage or an .onnx file.",
    )


def _is_gguf(path: Path) -> bool:
    """True by the ending, or by the first bytes: Ollama stores GGUF files without an ending."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF"


def _checkpoint(path: Path) -> dict[str, Any]:
    from edgellama.checkpoints import open_checkpoint

    opened = open_checkpoint(path, weights=False)
    config, tokenizer = opened.config, opened.tokenizer
    total = sum(info.nbytes for info in opened.infos.values())
    added = json.loads(tokenizer.files["tokenizer.json"]).get("added_tokens") or []
    tensors = [(name, info.dtype, prod(info.shape), info.nbytes) for name, info in opened.infos.items()]
    return {
        "format": opened.format,
        "parameters": config.parameters,
        "bytes": total,
        "bits_per_weight": 8 * total / config.parameters,
        "license": opened.license,
        "license_files": sorted(opened.license_files),
        "hub": opened.hub.to_dict() if opened.hub else None,
        "notes": list(opened.notes),
        **({"codes": opened.given.to_dict()} if opened.given else {}),
        "dtypes": grouped(("dtype",), (((dtype,), n, b) for _, dtype, n, b in tensors)),
        "modules": grouped(("module",), (((module_without_layer(name),), n, b) for name, _, n, b in tensors)),
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
            {"file": n, "bytes": b} for n, b in by_bytes({f.name: f.stat().st_size for f in opened.files})
        ],
    }
