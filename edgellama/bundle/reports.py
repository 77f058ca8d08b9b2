"""Reports read back: from a file that `--json` wrote, or from a bundle that an export validated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellama.bundle.bundle import Bundle, is_bundle
from edgellama.errors import BundleError, InputError
from edgellama.files import is_number, read_json, read_named_json
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


EXPORT_REPORT, EXPORT_SCHEMA = "reports/export.json", "edgellama.export/1"


def export_report(bundle: Bundle) -> dict[str, Any]:
    """What the export said about every tensor and about calibration; empty when the file is missing or damaged, which the
    gate has told."""
    if EXPORT_REPORT in bundle.manifest["files"] and not bundle.problems_by_file(EXPORT_REPORT):
        try:
            found = read_json(bundle.path / EXPORT_REPORT)
            if found["schema"] == EXPORT_SCHEMA:
                return {"tensors": _tensors(found), "notes": list(map(str, found["notes"]))} | _calibration(
                    found
                )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BundleError(
                f"{bundle.path / EXPORT_REPORT}: not the report of an export ({error})",
                remedy="Export the bundle again.",
            ) from error
    return {}


def _tensors(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": str(row["name"]),
            "scheme": str(row["scheme"]),
            "group_size": None if row["group_size"] is None else int(row["group_size"]),
            "bytes": int(row["bytes"]),
            "sqnr_db": None if row["sqnr_db"] is None else float(row["sqnr_db"]),
        }
        for row in found["tensors"]
    ]


def _calibration(found: Mapping[str, Any]) -> dict[str, Any]:
    if "calibration" not in found:
        return {}
    row = found["calibration"]
    return {
        "calibration": {
            "tokens": int(row["tokens"]),
            "windows": int(row["windows"]),
            "sha256": str(row["sha256"]),
            "texts": [{"name": str(text["name"])} for text in row["texts"]],
        }
    }
