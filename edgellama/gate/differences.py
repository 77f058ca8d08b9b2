"""Differences between JSON data and the data that was expected, each by its path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellama.errors import BundleError
from edgellama.files import read_json, to_json
from edgellama.report import Check, check
from edgellama.report.checks import listed


def differences(actual: Any, expected: Any, path: str) -> list[str]:
    """Differences in words, each by its path. Numbers of another type differ, since their bytes do.

    >>> differences({"ids": [2, 0], "name": "a"}, {"ids": [2], "name": "a"}, "model")
    ['model.ids is [2, 0], expected [2]']
    """
    if isinstance(actual, Mapping) and isinstance(expected, Mapping):
        names = sorted({*actual, *expected})
        missing = [f"{path}.{name} is missing" for name in names if name not in actual]
        extra = [f"{path}.{name} is not expected" for name in names if name not in expected]
        common = [name for name in names if name in actual and name in expected]
        inner = [d for name in common for d in differences(actual[name], expected[name], f"{path}.{name}")]
        return [*missing, *extra, *inner]
    if _rows(actual) and _rows(expected) and len(actual) == len(expected):
        pairs = enumerate(zip(actual, expected, strict=True))
        return [d for number, (a, b) in pairs for d in differences(a, b, f"{path}[{number}]")]
    if to_json(actual) == to_json(expected):
        return []
    return [f"{path} is {_short(actual)}, expected {_short(expected)}"]


def claim(name: str, problems: list[str], *, value: int | None = None, detail: str = "") -> Check:
    """A check without tolerance: passes if there are no problems. value: number of problems, or another count."""
    return check(
        name,
        not problems,
        value=len(problems) if value is None else value,
        limit=0 if value is None else None,
        detail=listed("", problems) or detail,
    )


def read_canonical(file: Path, name: str) -> tuple[Any, list[str]]:
    """(data, problems) of a JSON file of a bundle, which must have the bytes that edgellama writes for its data.

    A file with a repeated key has other data for other readers. Raises BundleError if it is not JSON.
    """
    try:
        data = read_json(file)
        same = file.read_text(encoding="utf-8") == to_json(data)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{file}: not readable as JSON ({error})", remedy="Export the bundle again."
        ) from error
    return data, [] if same else [f"{name} has other bytes than edgellama writes for its data"]


def _rows(data: Any) -> bool:
    """True for a list with an object in it. Other lists are compared as a whole, for shorter messages."""
    return isinstance(data, (list, tuple)) and any(isinstance(item, Mapping) for item in data)


def _short(data: Any) -> str:
    text = repr(list(data) if isinstance(data, tuple) else data)
    return text if len(text) <= 80 else text[:77] + "..."
