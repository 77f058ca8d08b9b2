"""Number formats for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def number(value: Any) -> str:
    """Formats a figure as short as its size allows; – for None."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def limit(value: Any) -> str:
    """Formats a limit as its author would write it, with at most four digits."""
    return f"{value:.4g}" if isinstance(value, float) else number(value)


def percent(value: float | None) -> str:
    """Formats a share in percent with one decimal; – for None."""
    return "–" if value is None else f"{value:.1%}".replace("%", " %")


def signed(value: float | None) -> str:
    """Formats a difference with its sign and four decimals; – for None."""
    return "–" if value is None else f"{value:+.4f}"


def megabytes(value: int | None) -> str:
    """Formats bytes as MB, below 1 MB as kB; – for None."""
    if value is None:
        return "–"
    return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e3:,.1f} kB"


def interval(pair: Sequence[float | None], how: str = "number") -> str:
    """Formats a 95 % interval. Empty if an end is unknown, since one window alone has no spread."""
    if any(end is None for end in pair):
        return ""
    format_end = percent if how == "percent" else number
    return f"{format_end(pair[0])} – {format_end(pair[1])}"
