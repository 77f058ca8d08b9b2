"""Reports read back: from a file that `--json` wrote, or from a bundle that an export validated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellama.bundle.bundle import Bundle, is_bundle
from edgellama.bundle.schema import conforming
from edgellama.errors import BundleError
from edgellama.files import read_json, read_named_json
from edgellama.text.overlap import Fingerprints

_REMEDY = (
    "Give a file that `edgellama validate --json FILE` wrote, or a bundle that was exported with its gate."
)


def read_reports(path: Path) -> dict[str, dict[str, Any]]:
    """Reports by target. Raises InputError for a file without reports, BundleError for a damaged bundle."""
    if path.is_dir() or is_bundle(path):
        return stored_reports(Bundle.open(path))
    data = read_named_json(path, "report", remedy=_REMEDY)
    rows = data if isinstance(data, list) and data else [data]
    return {str(row["target"]): row for row in (_checked(row, str(path)) for row in rows)}


def stored_reports(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """The reports that an export left in its bundle, by target; none where it was not validated.

    Raises BundleError for a damaged bundle, and for a report about another target or another artifact.
    """
    names = {target: f"reports/validate-{target}.json" for target in bundle.targets}
    reports = {
        target: _checked(read_json(bundle.verify(name)), str(bundle.path / name))
        for target, name in names.items()
        if name in bundle.manifest["files"]
    }
    for target, report in reports.items():
        artifact = bundle.artifact_sha256(target)
        # Reports of the first versions do not name their artifact.
        if report["target"] != target or report.get("artifact_sha256", artifact) != artifact:
            raise BundleError(
                f"{bundle.path / names[target]}: this report is about another artifact than the bundle's",
                remedy="Validate or export the bundle again.",
            )
    return reports


def _checked(report: Any, where: str) -> dict[str, Any]:
    """`report`, proven against report.schema.json."""
    return conforming(report, "report", label="report", where=where, remedy=_REMEDY)


EXPORT_REPORT, EXPORT_SCHEMA = "reports/export.json", "edgellama.export/1"


def export_report(bundle: Bundle) -> dict[str, Any]:
    """The export's record of every tensor and of calibration. Empty for a missing or damaged file: the gate reports that.

    Raises BundleError for a file of another form.
    """
    if EXPORT_REPORT in bundle.manifest["files"] and not bundle.problems_by_file(EXPORT_REPORT):
        try:
            report = read_json(bundle.path / EXPORT_REPORT)
            if report["schema"] == EXPORT_SCHEMA:
                notes = list(map(str, report["notes"]))
                return {"tensors": _tensors(report), "notes": notes} | _calibration(report)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BundleError(
                f"{bundle.path / EXPORT_REPORT}: not the report of an export ({error})",
                remedy="Export the bundle again.",
            ) from error
    return {}


def _tensors(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": str(row["name"]),
            "scheme": str(row["scheme"]),
            "group_size": None if row["group_size"] is None else int(row["group_size"]),
            "bytes": int(row["bytes"]),
            "sqnr_db": None if row["sqnr_db"] is None else float(row["sqnr_db"]),
        }
        for row in report["tensors"]
    ]


def _calibration(report: Mapping[str, Any]) -> dict[str, Any]:
    if "calibration" not in report:
        return {}
    row = report["calibration"]
    return {
        "calibration": {
            "tokens": int(row["tokens"]),
            "windows": int(row["windows"]),
            "sha256": str(row["sha256"]),
            "texts": [{"name": str(text["name"])} for text in row["texts"]],
        }
    }


def calibration_prints(bundle: Bundle) -> list[Fingerprints] | None:
    """Fingerprints of the texts that the bundle was calibrated on. None if its record does not name them.

    Early bundles recorded the hash of each text alone.
    """
    try:
        texts = read_json(bundle.path / EXPORT_REPORT)["calibration"]["texts"]
        return [
            Fingerprints.from_dict(row)
            if "fingerprints" in row
            else Fingerprints(str(row["sha256"]), 1, frozenset())
            for row in texts
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
