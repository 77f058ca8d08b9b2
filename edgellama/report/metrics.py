"""Metrics of the section `quality`, one row each: a new metric is a row here and its figure in gate/metrics.py.

Text, HTML page, Markdown, JUnit and the manifest's headline read this table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellama.report.numbers import interval, number, percent, signed

_STYLES = {"number": number, "percent": percent, "signed": signed}


@dataclass(frozen=True)
class Metric:
    """One figure, or a line of several.

    Attributes:
        key: figure of the section; a metric without that figure is left out.
        line: label and format of its line in the text; None for a figure in another metric's line.
        tile: label on the HTML page; None for no tile.
        style: format of the tile.
        note: format of the small print below the tile; None for the figure's interval.
        headline: figures that manifest, Markdown and JUnit repeat.
    """

    key: str
    line: tuple[str, str] | None = None
    tile: str | None = None
    style: str = "number"
    note: str | None = None
    headline: tuple[str, ...] = ()


_PERPLEXITIES = (
    "{ppl_reference:.2f} -> {ppl_artifact:.2f}, ln ratio {ln_ppl_ratio:+.4f} "
    "[{ln_ppl_ratio_low:+.4f}, {ln_ppl_ratio_high:+.4f}]"
)
METRICS = (
    Metric(
        "kl_mean",
        ("KL", "{kl_mean:.4f} [{kl_mean_low:.4f}, {kl_mean_high:.4f}] nats per token"),
        "KL, nats per token",
        headline=("kl_mean", "kl_mean_ci95"),
    ),
    Metric("kl_median", ("", "median {kl_median:.4f}, p99 {kl_p99:.3f}, p99.9 {kl_p999:.3f}")),
    Metric(
        "top1_agreement",
        ("top-1", "{top1_agreement:.1%} [{top1_agreement_low:.1%}, {top1_agreement_high:.1%}]"),
        "Top-1 agreement",
        "percent",
        headline=("top1_agreement", "top1_agreement_ci95"),
    ),
    Metric(
        "ppl_artifact",
        ("perplexity", _PERPLEXITIES),
        "Perplexity",
        note="full precision {ppl_reference_number}",
        headline=("ppl_reference", "ppl_artifact"),
    ),
    Metric("ln_ppl_ratio", None, "ln perplexity ratio", "signed"),
    Metric(
        "rms_dp",
        ("true token", "RMS change of its probability {rms_dp:.2%}"),
        "Change of the true token’s probability",
        "percent",
        "root mean square",
    ),
    Metric(
        "greedy_prefix_agreement",
        (
            "greedy",
            "{greedy_prefix_agreement:.1%} of the first {greedy_tokens} tokens equal up to the first difference",
        ),
        "Greedy text in common",
        "percent",
        "of {greedy_tokens} tokens, up to the first difference",
    ),
)
HEADLINE = tuple(key for metric in METRICS for key in metric.headline)


def perplexity(loss: float) -> float:
    """exp of the mean negative log-likelihood in nats. Infinite above 709 nats."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


def lines(quality: Mapping[str, Any]) -> list[str]:
    """Lines of the text, a label and figures each."""
    figures = _figures(quality)
    return [
        f"{metric.line[0]:<12} {metric.line[1].format(**figures)}"
        for metric in METRICS
        if metric.line is not None and metric.key in quality
    ]


def tiles(quality: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Tiles of the HTML page: label, figure, small print."""
    figures = _figures(quality)
    rows = []
    for metric in METRICS:
        if metric.tile is None or metric.key not in quality:
            continue
        pair = quality.get(f"{metric.key}_ci95", (None, None))
        note = (
            interval(pair, "percent" if metric.style == "percent" else "number")
            if metric.note is None
            else metric.note.format(**figures)
        )
        rows.append((metric.tile, _STYLES[metric.style](quality[metric.key]), note))
    return rows


def _figures(quality: Mapping[str, Any]) -> dict[str, Any]:
    """Figures under the names that formats use: NAME, NAME_low and NAME_high, NAME_number as people read it."""
    unknown = {key: math.nan for key, value in quality.items() if value is None}
    ends = {
        f"{key.removesuffix('_ci95')}_{end}": math.nan if value is None else value
        for key, pair in quality.items()
        if key.endswith("_ci95")
        for end, value in zip(("low", "high"), pair, strict=True)
    }
    return {
        **quality,
        **unknown,
        **ends,
        **{f"{key}_number": number(value) for key, value in quality.items()},
    }


def adapter_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines about adapters that were judged, and a line about those that were not."""
    lines = ["  adapters, each with the base against the merged full-precision model"]
    for row in (row for row in rows if row["judged"]):
        low, high = row["kl_mean_ci95"]
        lines.append(
            f"    {row['name']}: KL {row['kl_mean']:.4f} [{low:.4f}, {high:.4f}], top-1 {row['top1_agreement']:.1%} on "
            f"{row['tokens']} tokens; without it KL {row['without']['kl_mean']:.4f}, "
            f"top-1 {row['without']['top1_agreement']:.1%}; {row['bytes'] / 1e6:.2f} MB"
        )
    others = [row["name"] for row in rows if not row["judged"]]
    if others:
        lines.append(f"    not compared: {', '.join(others)} (give --adapters NAME=DIR)")
    return lines
