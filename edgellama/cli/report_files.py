"""The files that `--html`, `--markdown` and `--junit` name: the same reports for a person, a job's page, and a CI system."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgellama.bundle.bundle import Bundle, read_json, read_named_json
from edgellama.bundle.reports import is_number
from edgellama.errors import BundleError, InputError
from edgellama.report.markdown import to_junit, to_markdown
from edgellama.report.page import PageData, render
from edgellama.report.report import Report

EXPORT_REPORT = "reports/export.json"
BENCH_SCHEMA = "edgellama.bench/1"


@dataclass(frozen=True)
class Outputs:
    """Where to write what; None for nothing. bench: a benchmark's result, for the page."""

    html: Path | None = None
    markdown: Path | None = None
    junit: Path | None = None
    bench: Mapping[str, Any] | None = None
    _done: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Outputs:
        """From the parsed options. Raises InputError for a `--bench` file that is no benchmark's result."""
        bench = getattr(args, "bench", None)
        return cls(args.html, args.markdown, args.junit, None if bench is None else read_bench(bench))

    def __bool__(self) -> bool:
        return any(path is not None for path in (self.html, self.markdown, self.junit))

    def written(self) -> bool:
        """Whether the files are there."""
        return bool(self._done)

    def write(self, bundle: Bundle, reports: Sequence[Report | Mapping[str, Any]]) -> None:
        """All that were asked for, about one bundle."""
        rows = [report.to_dict() if isinstance(report, Report) else report for report in reports]
        name = str(bundle.manifest["name"])
        if self.html is not None:
            data = PageData(name, rows, bundle.manifest, export_report(bundle), self.bench)
            self._write(self.html, render(data))
        if self.markdown is not None:
            self._write(self.markdown, to_markdown(name, rows, bundle.manifest))
        if self.junit is not None:
            self._write(self.junit, to_junit(name, rows))

    def _write(self, path: Path, text: str) -> None:
        write_text(path, text)
        self._done.append(path)


def write_text(path: Path, text: str) -> None:
    """As UTF-8; a name that is not Unicode is written as an escape."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def export_report(bundle: Bundle) -> dict[str, Any]:
    """What the export said about every tensor and about calibration; empty when the file is missing or damaged, which the
    gate has told."""
    if EXPORT_REPORT in bundle.manifest["files"] and not bundle.problems_by_file(EXPORT_REPORT):
        try:
            found = read_json(bundle.path / EXPORT_REPORT)
            if found["schema"] == "edgellama.export/1":
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


def read_bench(path: Path) -> dict[str, Any]:
    """The result of `edgellama bench --json`. Raises InputError."""
    found = read_named_json(path, "benchmark", remedy=_BENCH)
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != BENCH_SCHEMA:
        raise InputError(f"{path}: schema is {schema!r:.60}, expected {BENCH_SCHEMA!r}", remedy=_BENCH)
    if not _is_bench(found):
        raise InputError(f"{path}: a benchmark with parts missing or of another kind", remedy=_BENCH)
    return dict(found)


def _is_bench(found: Mapping[str, Any]) -> bool:
    """Whether all is there that a page and a difference are made of."""
    try:
        spreads = [run[key] for row in found["candidates"] for run in row["runs"] for key in _SPREADS]
        ratios = [row[key] for row in found["ratios"] for key in ("prefill", "decode")]
        figures = [
            *(spread[key] for spread in (found["bandwidth"], *spreads) for key in ("median", "low", "high")),
            *(figure for ratio in ratios for figure in (ratio["mean"], *ratio["ci95"])),
            *(row[key] for row in found["candidates"] for key in ("load_s", "peak_resident_bytes")),
            *(run["prompt_tokens"] for row in found["candidates"] for run in row["runs"]),
            *(row["artifact_bytes"] for row in found["candidates"]),
        ]
        names = [
            found["machine"]["processor"],
            *(row[key] for row in found["candidates"] for key in ("name", "runtime")),
            *(row[key] for row in found["ratios"] for key in ("name", "over")),
        ]
        shares = [run["bandwidth_share"] for row in found["candidates"] for run in row["runs"]]
        return (
            bool(spreads)
            and all(isinstance(name, str) for name in names)
            and all(is_number(figure) and figure > 0 for figure in figures)
            and all(share is None or is_number(share) for share in shares)
            and all(len(ratio["ci95"]) == 2 for ratio in ratios)
            and {"cores"} <= found["machine"].keys()
            and {"repeat", "decode_tokens"} <= found.keys()
            and all("threads" in row for row in found["candidates"])
            and all("prompt_tokens" in row for row in found["ratios"])
        )
    except (KeyError, TypeError, AttributeError):
        return False


_SPREADS = ("time_to_first_token_s", "prefill_tok_s", "decode_tok_s")
_BENCH = "Give a file that `edgellama bench --json FILE` wrote."
