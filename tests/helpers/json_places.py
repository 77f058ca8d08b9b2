"""Walk over JSON data, for tests that change one value at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in JSON data, containers before their contents."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, (dict, list)):
            yield from places(value)
