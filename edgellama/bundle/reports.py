"""Reports read back: from a file that `--json` wrote, or from a bundle that an export validated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellama.bundle.bundle import Bundle, is_bundle, read_json, read_named_json
from edgellama.errors import InputError
from edgellama.report.report import SCHEMA

_REMEDY = (
    "Give a file that `edgellama validate --json FILE` wrote, or a bundle that was exported with its gate."
)
_QUALITY = ("kl_mean", "top1_agreement", "ppl_reference", "ppl_artifact")
_WINDOW = ("kl", "top1", "nll_reference", "nll_artifact")


def read_reports(path: Path) -> dict[str, dict[str, Any]]:
    """Reports by target. Raises InputError for what is none, BundleError for a damaged bundle."""
    if path.is_dir() or is_bundle(path):
        return stored_reports(Bundle.open(path))
    found = read_named_json(path, "report", remedy=_REMEDY)
    rows = found if isinstance(found, list) and found else [found]
    return {str(row["target"]): row for row in (_checked(row, str(path)) for row in rows)}


def stored_reports(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """The reports that an export left in its bundle, by target; none where it was not validated."""
    names = {target: f"reports/validate-{target}.json" for target in bundle.targets}
    return {
        target: _checked(read_json(bundle.verify(name)), str(bundle.path / name))
        for target, name in names.items()
        if name in bundle.manifest["files"]
    }


def _checked(report: Any, where: str) -> dict[str, Any]:
    """`report` with those parts proven that others calculate with."""
    schema = report.get("schema") if isinstance(report, Mapping) else None
    if schema != SCHEMA:
        raise InputError(f"{where}: schema is {schema!r:.60}, expected {SCHEMA!r}", remedy=_REMEDY)
    try:
        quality, scored = report["quality"], report.get("scored", {})
        sound = (
            isinstance(report["target"], str)
            and all(is_number(quality[key]) for key in (_QUALITY if quality else ()))
            and all(
                isinstance(row["sha256"], str)
                and isinstance(row["tokens"], int)
                and row["tokens"] > 0
                and all(is_number(row[key]) for key in _WINDOW)
                for row in (scored["windows"] if scored else ())
            )
            and (report["reference"] is None or isinstance(report["reference"]["sha256"], str))
            and all(isinstance(value, str) for value in report["tools"].values())
            and all(isinstance(log["device"], str) for log in report.get("device", ()))
            and all(
                log.get(key) is None or is_number(log[key])
                for log in report.get("device", ())
                for key in ("prefill_tok_s", "decode_tok_s")
            )
        )
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise InputError(f"{where}: a report with parts missing or of another kind", remedy=_REMEDY)
    return dict(report)


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
