"""Summary of a validation in Markdown, for a CI job (`--markdown`).

Names and texts come from untrusted files. They stand in code spans, where HTML, links and mentions do not
work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgellama.report.checks import worst_verdict
from edgellama.report.numbers import interval, limit, megabytes, number, percent, signed
from edgellama.report.tables import printable

_MARKS = {"pass": "✅", "fail": "❌", "inconclusive": "⚠️"}


def to_markdown(name: str, reports: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> str:
    """Returns GitHub-flavoured Markdown.

    It has the verdict, the headline of each target, the checks that did not pass, and all checks folded.
    """
    verdict = worst_verdict(report["verdict"] for report in reports)
    sizes = {entry["target"]: entry["bytes"] for entry in manifest.get("artifacts", ())}
    lines = [f"### {_MARKS[verdict]} edgellama: {_code(name)} {_WORDS[verdict]}", ""]
    lines += _table(
        ("target", "verdict", "KL, nats per token", "top-1", "perplexity", "size", "tokens"),
        [
            (
                _code(report["target"]),
                f"{_MARKS[report['verdict']]} {report['verdict']}",
                *_headline(report["quality"]),
                megabytes(sizes.get(report["target"])),
                number(report["tokens"]),
            )
            for report in reports
        ],
    )
    lines += _regressions(reports)
    rows = [(report["target"], check) for report in reports for check in report["checks"]]
    if wrong := [row for row in rows if row[1]["verdict"] != "pass"]:
        lines += ["", "**Did not pass**", "", *_checks(wrong)]
    lines += ["", f"<details><summary>All {len(rows)} checks</summary>", "", *_checks(rows), "", "</details>"]
    return "\n".join(lines) + "\n"


_WORDS = {"pass": "passed", "fail": "failed", "inconclusive": "is inconclusive"}


def _headline(quality: Mapping[str, Any]) -> tuple[str, str, str]:
    if not quality:
        return "not compared", "", ""
    kl, top1 = interval(quality["kl_mean_ci95"]), interval(quality["top1_agreement_ci95"], "percent")
    return (
        f"{number(quality['kl_mean'])} ({kl})",
        f"{percent(quality['top1_agreement'])} ({top1})",
        f"{number(quality['ppl_reference'])} → {number(quality['ppl_artifact'])}"
        if "ppl_reference" in quality
        else "",
    )


def _regressions(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    sections = [(report["target"], report["regression"]) for report in reports if report.get("regression")]
    if not sections:
        return []
    rows = [
        (
            _code(target),
            f"{number(section['kl_before'])} → {number(section['kl_now'])}",
            f"{signed(section['kl_difference'])} ({interval(section['kl_difference_ci95'])})",
            number(section["tokens"]),
        )
        for target, section in sections
    ]
    return [
        "",
        "**Against the earlier report**",
        "",
        *_table(("target", "KL", "difference", "tokens"), rows),
    ]


def _checks(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    return _table(
        ("target", "check", "value", "limit", "detail"),
        [
            (
                _code(target),
                f"{_MARKS[check['verdict']]} {_code(check['name'])}",
                "" if check["value"] is None else _code(number(check["value"])),
                "" if check["limit"] is None else _code(limit(check["limit"])),
                _code(check["detail"]) if check["detail"] else "",
            )
            for target, check in rows
        ],
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ([cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows))
    return [f"| {' | '.join(line)} |" for line in lines]


def _code(text: str) -> str:
    """Returns a code span that shows `text` unchanged, cut at 400 letters."""
    text = printable(text if len(text) <= 400 else f"{text[:399]}…").strip() or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    gap = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{gap}{text}{gap}{fence}"
