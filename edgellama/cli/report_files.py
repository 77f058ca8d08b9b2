"""Report files of `--html`, `--markdown` and `--junit`: for a person, a CI job's page, and a CI system."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.reports import export_report
from edgellama.files import write_text
from edgellama.report import Report
from edgellama.report.junit import to_junit
from edgellama.report.markdown import to_markdown
from edgellama.report.page import PageData, render


@dataclass(frozen=True)
class Outputs:
    """Destinations of the report files; None for a file that is not written.

    bench: result of a benchmark, shown on the page.
    """

    html: Path | None = None
    markdown: Path | None = None
    junit: Path | None = None
    bench: Mapping[str, Any] | None = None
    _done: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Outputs:
        """Reads the parsed options. Raises InputError if the `--bench` file is not a benchmark's result."""
        if getattr(args, "bench", None) is None:
            return cls(args.html, args.markdown, args.junit)
        from edgellama.commands.bench import read_bench  # imports torch

        return cls(args.html, args.markdown, args.junit, read_bench(args.bench))

    def __bool__(self) -> bool:
        return any(path is not None for path in (self.html, self.markdown, self.junit))

    def written(self) -> bool:
        """True if `write` has written any file."""
        return bool(self._done)

    def write(self, bundle: Bundle, reports: Sequence[Report | Mapping[str, Any]]) -> None:
        """Writes the requested files about one bundle."""
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
