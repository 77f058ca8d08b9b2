"""JSON data as plain text for people: aligned labels and tables, sizes with a unit.

Characters that would move the cursor are escaped.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

WIDTH = 110  # columns, unless a line cannot be broken
SHOWN = 24  # entries of a list


class Unit(Enum):
    """Unit of a number, which decides its form."""

    NONE = "none"
    BYTES = "bytes"
    SHARE = "share"
    ID = "id"


# Units by the ends of keys.
UNITS = {
    "bytes": Unit.BYTES,
    "weights": Unit.BYTES,
    "kv_cache": Unit.BYTES,
    "peak_estimate": Unit.BYTES,
    "share": Unit.SHARE,
    "id": Unit.ID,
    "ids": Unit.ID,
}


def to_text(data: Mapping[str, Any]) -> str:
    """Returns the object as aligned plain text: single values, then each section as a table or a block.

    Keys become the labels. Lists of objects become tables, objects become blocks. Sections are indented below
    their name.
    """
    return "\n".join(_block(data, ""))


def _block(data: Mapping[str, Any], indent: str) -> Iterator[str]:
    single = {
        _label(key): _cell(key, value, unit=True) for key, value in data.items() if not _is_section(value)
    }
    width = max(map(len, single), default=0)
    for label, cell in single.items():
        yield from textwrap.wrap(
            f"{indent}{label:<{width}}  {cell}",
            WIDTH,
            subsequent_indent=" " * (len(indent) + width + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
    for key, value in data.items():
        if not _is_section(value):
            continue
        if not indent:
            yield ""
        yield f"{indent}{_label(key)}"
        if isinstance(value, Mapping):
            yield from _block(value, indent + "  ")
        elif any(_is_section(cell) for row in value for cell in row.values()):
            for row in value:
                yield from _block(row, indent + "  ")
        else:
            yield from _table(value, indent + "  ")


def _table(rows: Sequence[Mapping[str, Any]], indent: str) -> Iterator[str]:
    """Yields rows of the same keys, below a line of their names. Numbers are aligned to the right."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[_label(key) for key in keys]]
    lines += [[_cell(key, row.get(key)) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [any(isinstance(row.get(key), (int, float)) for row in rows) for key in keys]
    for line in lines:
        cells = zip(line, widths, right, strict=True)
        yield indent + "  ".join(f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in cells).rstrip()


def _is_section(value: Any) -> bool:
    return bool(value) and (
        isinstance(value, Mapping) or (isinstance(value, list) and isinstance(value[0], Mapping))
    )


def _label(key: str) -> str:
    return printable(key.replace("_", " "))


def _cell(key: str, value: Any, *, unit: bool = False) -> str:
    """Formats one value. unit: add kB or MB to a number of bytes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        text = str(value) if _unit(key) is Unit.ID else f"{value:,}"
        return f"{text} ({_rounded(value)})" if unit and _unit(key) is Unit.BYTES else text
    if isinstance(value, float):
        if _unit(key) is Unit.SHARE:
            return f"{value:.1%}"
        return f"{value:.4g}" if abs(value) < 1e3 else f"{value:g}"
    if isinstance(value, str):
        return printable(value) if value and value == value.strip() else f'"{printable(value)}"'
    if not value:
        return "-" if value is None else "none"
    items = ", ".join(_cell(key, item) for item in value[:SHOWN])
    more = f" and {len(value) - SHOWN} more" if len(value) > SHOWN else ""
    return items + more if all(isinstance(item, str) for item in value) else f"[{items}{more}]"


def _unit(key: str) -> Unit:
    return next((unit for end, unit in UNITS.items() if key.endswith(end)), Unit.NONE)


def _rounded(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def printable(text: str) -> str:
    """Escapes characters that could move the terminal's cursor.

    The text may come from a hostile file.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
