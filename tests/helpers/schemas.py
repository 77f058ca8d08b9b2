"""JSON Schemas: their names, and the parts that a schema is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tests.helpers.paths import ROOT

NAMES = sorted(path.name.removesuffix(".schema.json") for path in (ROOT / "edgellama").glob("*.schema.json"))


def subschemas(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schema and every schema inside it, so that no keyword of theirs is overlooked."""
    yield schema
    for key in ("properties", "$defs"):
        for child in schema.get(key, {}).values():
            yield from subschemas(child)
    for child in (schema.get(key) for key in ("items", "additionalProperties", "propertyNames")):
        if isinstance(child, Mapping):
            yield from subschemas(child)
    for child in schema.get("anyOf", ()):
        yield from subschemas(child)


def keywords(schema: Mapping[str, Any]) -> set[str]:
    """Keywords of the schema and of every schema inside it."""
    return {keyword for part in subschemas(schema) for keyword in part}
