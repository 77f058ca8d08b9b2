"""Contents of a bundle: artifacts, tensors by scheme, accuracy, recipe, source and files."""

from __future__ import annotations

from math import prod
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.reports import EXPORT_REPORT, EXPORT_SCHEMA
from edgellama.commands.inspect_rows import (
    GROUP_KEYS,
    by_bytes,
    by_layer,
    module_without_layer,
    only,
    with_shares,
)
from edgellama.errors import BundleError
from edgellama.files import read_json
from edgellama.recipe import Scheme
from edgellama.report.metrics import HEADLINE

_TENSOR_KEYS = ("name", "dtype", "shape", "range")
_REQUIRES_KEYS = ("runtime", "min_version", "min_os", "backends", "operators")
_ACCURACY_KEYS = ("verdict", "tokens", *HEADLINE)


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """Contents of an open bundle: JSON data. Altered files are listed under `problems`."""
    manifest, bad = bundle.manifest, bundle.problems_by_file()
    files = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    recipe = manifest["recipe"]
    return {
        "name": manifest["name"],
        "bytes": sum(files.values()),
        "context_length": bundle.context_length,
        "problems": list(bad.values()),
        "artifacts": [
            {
                **only(entry, ("target", "path", "bytes")),
                "memory": only(entry["memory"], ("weights", "kv_cache", "peak_estimate")),
                "quantization": with_shares([only(row, GROUP_KEYS) for row in entry["quantization"]]),
                "requires": only(entry["requires"], _REQUIRES_KEYS),
                **{
                    k: by_layer([only(x, _TENSOR_KEYS) for x in entry[k]])
                    for k in ("inputs", "outputs", "states")
                },
            }
            for entry in manifest["artifacts"]
        ],
        "tensors": [] if EXPORT_REPORT in bad else _tensor_rows(bundle),
        "accuracy": {target: only(h, _ACCURACY_KEYS) for target, h in manifest["accuracy"].items()},
        "recipe": only(recipe, ("name", "summary", "algorithm"))
        | {"rules": [{"modules": r["modules"], "scheme": _scheme(r["scheme"])} for r in recipe["rules"]]},
        "source": manifest["source"],
        "model": only(manifest["model"], bundle.config.to_dict()),
        "chat": manifest["chat"],
        **({"classifier": manifest["classifier"]} if "classifier" in manifest else {}),
        **({"adapters": _adapters(bundle)} if "adapters" in manifest else {}),
        "tools": manifest["tools"],
        "files": [{"file": n, "bytes": b, "as_exported": n not in bad} for n, b in by_bytes(files)],
    }


def _adapters(bundle: Bundle) -> list[dict[str, Any]]:
    """A row for each adapter that is switched at run time, with the bytes of its files."""
    files = bundle.manifest["files"]
    return [
        {
            **only(entry, ("name", "rank", "parameters", "sha256")),
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
            groups.setdefault((module_without_layer(row["name"]), str(row["scheme"])), []).append(row)
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
    return with_shares(rows)


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**53:
        raise ValueError(f"a size is {value!r:.60}")
    return value


def _scheme(scheme: dict[str, Any] | None) -> str:
    return Scheme.from_dict(scheme).describe() if scheme else "float32"
