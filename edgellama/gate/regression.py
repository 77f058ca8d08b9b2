"""Regression: comparison with an earlier report on the same windows of the same text (`--baseline`).

The text causes most of the difference between windows. The paired difference, window by window, is therefore
far more
precise than either mean: a change of 2 % is visible even if the intervals of the means are 10 % wide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.bundle.reports import read_reports
from edgellama.errors import InputError, UsageError
from edgellama.gate.limits import increase_limit
from edgellama.gate.metrics import clustered_mean
from edgellama.gate.quality import window_sha256
from edgellama.report import Check, Report, below
from edgellama.text.windows import Window


def read_baseline(path: Path, target: str, reference_sha256: str) -> dict[str, Any]:
    """The earlier report about `target`, from a report file or a bundle.

    Raises InputError if it is about other targets, lacks the scored windows, or used another checkpoint.
    """
    reports = read_reports(path)
    if target not in reports:
        raise InputError(
            f"{path} is about {', '.join(reports) or 'no target'}, not about {target!r}",
            remedy="Give a report about the same target, or choose one with -t.",
        )
    report = reports[target]
    if not report.get("scored"):
        raise InputError(
            f"{path} has no section `scored`, window by window",
            remedy="Make the report again with this version: edgellama validate OLD --reference CHECKPOINT --json FILE.",
        )
    actual = report["reference"]["sha256"] if report["reference"] else None
    if actual != reference_sha256:
        raise InputError(
            f"{path} compares with another checkpoint (sha256 {str(actual)[:12]}…, here {reference_sha256[:12]}…)",
            remedy="Give a report with the same --reference.",
        )
    return report


def check_limit(max_kl_increase: float | None, baseline: object) -> None:
    """Raises UsageError for a limit without a baseline, or outside [0, 100] nats per token."""
    if max_kl_increase is None:
        return
    if baseline is None:
        raise UsageError("--max-kl-increase was given without --baseline", remedy="Add --baseline REPORT.")
    if not 0 <= max_kl_increase <= 100:
        raise UsageError(
            f"max_kl_increase must lie in [0, 100], got {max_kl_increase!r}", remedy="Correct the limit."
        )


def check_windows(windows: Sequence[Window], baseline: Mapping[str, Any]) -> None:
    """Raises InputError if the windows to score are not those of the earlier report. Call it before scoring.

    windows: the first windows to score. Only as many as both have are compared.
    """
    earlier = baseline["scored"]["windows"]
    for i, (window, row) in enumerate(zip(windows, earlier, strict=False)):
        if window_sha256(window) == row["sha256"]:
            continue
        reason = (
            f"its windows have {row['tokens']} tokens, here {len(window.tokens)}"
            if row["tokens"] != len(window.tokens)
            else f"its text {row.get('domain')!r:.60} is not the text {window.domain!r:.60} here"
            if row.get("domain") != window.domain
            else "other token ids: another text of the same name, another tokenizer, or a report of a version "
            "that chose other windows"
        )
        raise InputError(
            f"the baseline scored other tokens in window {i + 1}: {reason}",
            remedy="Give the same texts in the same order (--text), and a bundle of the same context and tokenizer.",
        )


def with_regression(report: Report, baseline: Mapping[str, Any], max_kl_increase: float | None) -> Report:
    """Adds the section `regression` and the check `regression.kl` to `report`.

    Returns `report` unchanged if nothing was scored. max_kl_increase: nats per token; None for the default.
    """
    if not report.scored:
        return report
    section = paired(baseline["scored"]["windows"], report.scored["windows"])
    limit = increase_limit(section["kl_before"]) if max_kl_increase is None else max_kl_increase
    section |= {"tools_before": dict(baseline["tools"])}
    return replace(
        report, regression=section, checks=(*report.checks, increase("regression.kl", section, limit))
    )


def increase(name: str, section: Mapping[str, Any], limit: float) -> Check:
    """Check that the KL grew by at most `limit`, nats per token. The interval of the difference decides."""
    low, high = section["kl_difference_ci95"]
    return below(
        name,
        section["kl_difference"],
        limit,
        interval=(low, high),
        detail=f"{section['kl_before']:.4f} before, {section['kl_now']:.4f} now; the difference lies in "
        f"[{low:+.4f}, {high:+.4f}], {section['tokens']} tokens",
    )


def paired(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the windows that both have, and the differences (now - before) with their intervals.

    A window counts once. before, now: rows of `scored.windows`. Raises InputError if the windows differ.
    """
    pairs = list({str(a["sha256"]): (a, b) for a, b in zip(before, now, strict=False)}.values())
    if not pairs or any(a["sha256"] != b["sha256"] for a, b in pairs):
        raise InputError(
            "the two reports scored other tokens: they cannot be compared window by window",
            remedy="Make both with the same texts, context and tokenizer.",
        )
    section: dict[str, Any] = {"tokens": sum(a["tokens"] for a, _ in pairs), "windows": len(pairs)}
    for name, field in (("kl", "kl"), ("top1", "top1"), ("ln_ppl", "nll_artifact")):
        if not all(field in row for pair in pairs for row in pair):
            continue  # a classifier has no loss of a next token
        section[f"{name}_before"] = _mean([a for a, _ in pairs], field)
        section[f"{name}_now"] = _mean([b for _, b in pairs], field)
        # Each token gets its window's mean. An interval clustered by window depends on the sums of windows
        # only.
        difference = clustered_mean(
            [np.full(a["tokens"], _figure(b, field) - _figure(a, field)) for a, b in pairs],
            [str(a.get("domain")) for a, _ in pairs],
        )
        section |= difference.fields(f"{name}_difference")
    return section


def _mean(rows: Sequence[Mapping[str, Any]], field: str) -> float:
    tokens = sum(row["tokens"] for row in rows)
    return float(math.fsum(_figure(row, field) * row["tokens"] for row in rows) / tokens)


def _figure(row: Mapping[str, Any], field: str) -> float:
    """A figure of a window. NaN, which fails every limit, for a number that is not finite."""
    return math.nan if row[field] is None else float(row[field])
