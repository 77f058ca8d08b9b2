"""Validation by JSON Schema, for the keywords that the published schemas use. Reading enforces these schemas.

It is stricter than the standard in one point: 1.0 is not an integer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from edgellama.errors import InputError

# Keywords that are checked, and keywords that only describe. A schema must use no others.
CHECKED = {
    *(
        "$ref",
        "type",
        "enum",
        "anyOf",
        "pattern",
        "minimum",
        "exclusiveMinimum",
        "maximum",
        "minItems",
        "maxItems",
    ),
    *("items", "required", "dependentRequired", "properties", "additionalProperties", "propertyNames"),
}
DESCRIBING = {"$schema", "$id", "$defs", "title", "description"}

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


@cache
def published(name: str) -> dict[str, Any]:
    """The schema published as NAME.schema.json: `manifest`, `golden`, `device` or `build`."""
    text = (files("edgellama") / f"{name}.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def manifest_schema() -> dict[str, Any]:
    """The published schema of a bundle's manifest."""
    return published("manifest")


def conforming(data: Any, name: str, *, label: str, where: str, remedy: str) -> dict[str, Any]:
    """Returns `data`, proven against NAME.schema.json.

    label: the data's own name in messages. where: the file. Raises InputError.
    """
    schema = published(name)
    (expected,) = schema["properties"]["schema"]["enum"]
    actual = data.get("schema") if isinstance(data, Mapping) else None
    if actual != expected:
        raise InputError(f"{where}: schema is {actual!r:.60}, expected {expected!r}", remedy=remedy)
    for violation in violations(data, schema, schema, label):
        raise InputError(f"{where}: {violation}", remedy=remedy)
    return dict(data)


def violations(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> Iterator[str]:
    """Violations of `schema` by `value`, in words.

    root: the schema that holds the `$defs`. where: name of the value in the messages.
    """
    if not schema:
        return
    if "$ref" in schema:
        yield from violations(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, where)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        yield f"{where} is {_short(value)}, expected {' or '.join(kinds)}"
        return
    if value not in schema.get("enum", [value]):
        yield f"{where} is {_short(value)}, expected {' or '.join(map(json.dumps, schema['enum']))}"
    if "anyOf" in schema and all(any(violations(value, s, root, where)) for s in schema["anyOf"]):
        yield f"{where} is {_short(value)}, which is none of the forms that it may have"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{where} is {_short(value)}, expected: {schema.get('description', schema['pattern'])}"
    elif _is(value, "number"):
        yield from _bounds(value, schema, where)
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            yield f"{where} has {len(value)} entries"
        for number, item in enumerate(value):
            yield from violations(item, schema.get("items", {}), root, f"{where}[{number}]")
    elif isinstance(value, dict):
        yield from _object(value, schema, root, where)


def _object(
    value: dict[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], where: str
) -> Iterator[str]:
    missing = [name for name in schema.get("required", ()) if name not in value]
    for present, others in schema.get("dependentRequired", {}).items():
        missing += [name for name in others if present in value and name not in value]
    if missing:
        yield f"{where} has no {', '.join(missing)}"
    known, other = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, item in value.items():
        yield from violations(name, schema.get("propertyNames", {}), root, f"a name in {where}")
        if name in known:
            yield from violations(item, known[name], root, f"{where}.{name}")
        elif isinstance(other, dict):
            yield from violations(item, other, root, f"{where}[{_short(name)}]")
        elif not other:
            yield f"{where} has {_short(name)}, which is not known there"


def _bounds(value: float, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    if not low <= value <= high or value <= schema.get("exclusiveMinimum", -math.inf):
        yield f"{where} is {_short(value)}, out of bounds"


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
