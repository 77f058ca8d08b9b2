"""Verb `diff` of the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellama.cli.arguments import VERDICT_CODES, json_option, size_or_zero, write_json


def options(p: argparse.ArgumentParser) -> None:
    accepted = "a bundle, or a file that `validate --json` or `bench --json` wrote"
    p.add_argument("a", metavar="A", type=Path, help=accepted)
    p.add_argument("b", metavar="B", type=Path, help="another of the same kind")
    p.add_argument(
        "--max-kl-increase",
        metavar="X",
        type=float,
        help="fail if the mean KL rises by more than X nats per token from A to B, on the same tokens",
    )
    p.add_argument(
        "--max-bytes-increase",
        metavar="SIZE",
        type=size_or_zero,
        help="fail if an artifact grows by more than SIZE from A to B; 0, 500KB, 2MiB, …",
    )
    p.add_argument("--identical", action="store_true", help="fail if anything differs")
    json_option(p)


def main(args: argparse.Namespace) -> int:
    """Prints the differences. Returns the exit code of the verdict."""
    from edgellama.commands.diff import diff

    data = diff(
        args.a,
        args.b,
        max_kl_increase=args.max_kl_increase,
        max_bytes_increase=args.max_bytes_increase,
        identical=args.identical,
    )
    print(shown(data), file=sys.stderr if args.json == "-" else sys.stdout)
    write_json(args.json, data)
    return VERDICT_CODES[data["verdict"]]


def shown(data: Mapping[str, Any]) -> str:
    """The differences as text. Equal parts are left out."""
    from edgellama.report.tables import to_text

    view: dict[str, Any] = {"a": data["a"], "b": data["b"], "identical": data["identical"]}
    for name in ("manifest", "modules", "speed"):
        if data.get(name):
            view[name] = [{k: _brief(v) for k, v in row.items()} for row in data[name]]
    for name, names in data.get("files", {}).items():
        if names:
            view[f"files {name}"] = names
    for row in data.get("artifacts", ()):
        if not row.get("same_file"):
            view[row["target"]] = {
                k: v for k, v in row.items() if k not in ("target", "same_file") and v != []
            }
    if data.get("accuracy"):
        view["accuracy"] = [_accuracy_row(row) for row in data["accuracy"]]
    if data["checks"]:
        view["checks"] = [
            {k: _brief(c[k]) for k in ("verdict", "name", "value", "limit")} for c in data["checks"]
        ]
        view["verdict"] = data["verdict"]
    return to_text(view)


def _accuracy_row(row: Mapping[str, Any]) -> dict[str, Any]:
    if "not_compared" in row:
        return {"target": row["target"], "tokens": None, "KL": row["not_compared"]}
    cells: dict[str, Any] = {"target": row["target"], "tokens": row["tokens"]}
    for name, key in (("KL", "kl"), ("top-1", "top1"), ("ln ppl", "ln_ppl")):
        low, high = row[f"{key}_difference_ci95"]
        cells[name] = (
            f"{row[f'{key}_before']:.4f} -> {row[f'{key}_now']:.4f}, "
            f"{row[f'{key}_difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
        )
    return cells


def _brief(value: Any) -> Any:
    text = value if isinstance(value, str) else str(value) if isinstance(value, (list, dict)) else None
    return value if text is None else text if len(text) <= 40 else f"{text[:39]}…"
