"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def number(value: Any) -> str:
    """A figure as short as its size allows; – for none."""
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
    """A limit, which people wrote: as they would write it."""
    return f"{value:.4g}" if isinstance(value, float) else number(value)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}".replace("%", " %")


def megabytes(value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e3:,.1f} kB"


def interval(pair: Sequence[float | None], how: str = "number") -> str:
    """A 95 % interval; nothing where its ends are unknown (one window alone has no spread)."""
    if any(end is None for end in pair):
        return ""
    shown = percent if how == "percent" else number
    return f"{shown(pair[0])} – {shown(pair[1])}"
