"""Seeded mutations of untrusted input: bytes, JSON, protobuf messages, templates."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

OUTSIDE = "/etc/hostname"  # a file that no reader may open; the worker detects it

NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64),
    *(-(2**31), -(2**63), 10**30, 1e308, -1e308, 1e-320, 0.5, -0.0, 4096.5),
)
STRINGS = (
    *(
        "",
        " ",
        "..",
        ".",
        "../x",
        "../../../../../etc/hostname",
        OUTSIDE,
        "/",
        "a/b",
        "a\\b",
        "C:\\x",
        "~",
        "\0",
    ),
    *(
        "x" * 3000,
        "\x1b[31mred\x1b[0m",
        "\n\nedgellama: all is well\n",
        "\u202e",
        "\ud800",
        "🙂" * 50,
        "'\"`$(id)",
    ),
    *("NaN", "null", "0", "{}", "(a+)+$", "%s%n", "{0.__class__}", "model.safetensors", "golden.json"),
)
RAW = (
    *(
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e999",
        b"-0",
        b"01",
        b"1" * 5000,
        b"[" * 100_000,
        b'{"a":' * 20_000,
    ),
    *(b"[" * 400 + b"]" * 400, b'"\\ud800"', b'"\xff\xfe"', b'"\\u0000"', b"tru", b"'x'", b"//x\n1", b""),
)


def mutate_json(rng: random.Random, value: Any) -> bytes:
    """JSON of `value` with one to four changed places, some of which are malformed JSON."""
    value = json.loads(json.dumps(value))
    raw: dict[bytes, bytes] = {}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _change(rng, value, raw)
    data = json.dumps(value, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    for mark, content in raw.items():
        data = data.replace(mark, content)
    return mutate_bytes(rng, data) if rng.random() < 0.1 else data


def _change(rng: random.Random, value: Any, raw: dict[bytes, bytes]) -> Any:
    """`value` with one change. The random walk to its place ends at each level with a chance of 15 %.

    `raw` maps marks in the JSON to the bytes that replace them.
    """
    node: Any = value
    path: list[tuple[Any, Any]] = []
    while isinstance(node, (dict, list)) and node and (not path or rng.random() < 0.85):
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        path.append((node, key))
        node = node[key]
    if not path:
        return rng.choice([None, [], {}, 0, "x"])
    holder, key = path[-1]
    kind = rng.random()
    if isinstance(holder, dict) and kind < 0.1:
        del holder[key]
    elif isinstance(holder, dict) and kind < 0.2:
        holder[rng.choice((*STRINGS, f"{key}_", str(key).upper()))] = holder.pop(key)
    elif isinstance(holder, dict) and kind < 0.27:  # a repeated key
        mark = f"@@{len(raw)}@@"
        doubled = f'"{mark}":'.encode()
        raw[doubled] = json.dumps(key).encode() + b":" + json.dumps(rng.choice(NUMBERS)).encode() + b","
        raw[doubled] += json.dumps(key).encode() + b":"
        items = list(holder.items())
        holder.clear()
        holder.update({(mark if name == key else name): item for name, item in items})
    elif isinstance(holder, list) and kind < 0.1:
        del holder[key]
    elif isinstance(holder, list) and kind < 0.2:
        holder.insert(key, holder[key])
    elif isinstance(holder, list) and kind < 0.23:
        holder[key:key] = [holder[key]] * 2000
    elif kind < 0.4:
        mark = f"@@{len(raw)}@@"
        raw[f'"{mark}"'.encode()] = rng.choice(RAW)
        holder[key] = mark
    else:
        holder[key] = _different_value(rng, holder[key])
    return value


def _different_value(rng: random.Random, value: Any) -> Any:
    """A different value, with a chance of one half of the same type."""
    if rng.random() < 0.5:
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, float)):
            return rng.choice((*NUMBERS, value + 1, value - 1, value * 2, -value))
        if isinstance(value, str):
            cut = rng.randrange(len(value) + 1)
            return rng.choice((*STRINGS, value[:cut], value + rng.choice(STRINGS), value.swapcase()))
    return rng.choice(
        (rng.choice(NUMBERS), rng.choice(STRINGS), None, True, False, [], {}, [[]], {"": {}}, [value])
    )


def mutate_bytes(rng: random.Random, data: bytes, *, head: int | None = None) -> bytes:
    """`data` with bits flipped, bytes removed or repeated, or numbers written, mostly in the first `head` bytes."""
    mutated = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        if not mutated:
            return bytes(mutated)
        limit = len(mutated) if head is None or rng.random() < 0.15 else min(head, len(mutated))
        start = rng.randrange(limit)
        kind = rng.randrange(8)
        if kind == 0:
            mutated[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            mutated[start] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            number = rng.choice(
                (0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, len(mutated), rng.randrange(2**64))
            )
            size = rng.choice((2, 4, 4, 8))
            mutated[start : start + size] = struct.pack("<Q", number % 2**64)[:size]
        elif kind == 3:
            del mutated[start : start + rng.choice((1, 2, 4, 8, 100))]
        elif kind == 4:
            mutated[start:start] = rng.randbytes(rng.choice((1, 4, 8, 64)))
        elif kind == 5:
            end = start + rng.choice((4, 16, 64))
            mutated[start:start] = mutated[start:end]
        elif kind == 6:
            source = rng.randrange(limit)
            mutated[start : start + 8] = mutated[source : source + 8]
        elif rng.random() < 0.3:
            del mutated[start:]
    return bytes(mutated)


def mutate_message(rng: random.Random, message: Any) -> None:
    """Changes one to three fields of a protobuf message in place, at any depth."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        parent = message
        while True:
            fields = parent.ListFields()
            if not fields:
                break
            field, value = rng.choice(fields)
            repeated = (
                not hasattr(value, "DESCRIPTOR")
                and hasattr(value, "__len__")
                and not isinstance(value, (str, bytes))
            )
            child = value
            if repeated and len(value):
                keys = list(value)
                key = rng.choice(keys) if hasattr(value, "keys") else rng.randrange(len(value))
                child = value[key]
            if hasattr(child, "ListFields") and rng.random() < 0.85:
                parent = child
                continue
            _change_field(rng, parent, field.name, value, repeated)
            break


def _change_field(rng: random.Random, message: Any, name: str, value: Any, repeated: bool) -> None:
    if rng.random() < 0.2:
        message.ClearField(name)
        return
    try:
        if repeated and not hasattr(value, "keys"):
            at = rng.randrange(len(value))
            if hasattr(value[at], "CopyFrom"):
                value.add().CopyFrom(value[at]) if rng.random() < 0.5 else value.pop(at)
            else:
                value[at] = _same_type(rng, value[at])
        elif repeated:
            key = rng.choice(list(value))
            if hasattr(value[key], "CopyFrom"):
                value[rng.choice(STRINGS)].CopyFrom(value[key])
            del value[key]
        elif hasattr(value, "CopyFrom"):
            value.Clear()
        else:
            setattr(message, name, _same_type(rng, value))
    except (ValueError, TypeError, UnicodeEncodeError):
        message.ClearField(name)  # the field cannot have this value


def _same_type(rng: random.Random, value: Any) -> Any:
    """A mutated string or bytes, or else a number."""
    if isinstance(value, str):
        return rng.choice((*STRINGS, value + "x", value[:-1]))
    if isinstance(value, bytes):
        return mutate_bytes(rng, value)
    return rng.choice(NUMBERS)


def mutate_template(rng: random.Random, source: str) -> str:
    """A chat template with parts removed, repeated and inserted."""
    pieces = (
        *(
            "{% for a in range(9999) %}",
            "{% endfor %}",
            "{{ 'x' * 10**9 }}",
            "{{ messages }}",
            "{% set x = x ~ x %}",
        ),
        *(
            "{% if",
            "%}",
            "{{",
            "}}",
            "{#",
            "|",
            "| tojson",
            "[0]",
            ".__class__",
            "loop.index ** 99",
            "{% macro f() %}",
        ),
        *(
            "{{ f() }}",
            "{% endmacro %}",
            "(" * 300,
            "\0",
            "🙂",
            "{% raw %}",
            "{% include 'x' %}",
            "| batch(2)",
        ),
    )
    for _ in range(rng.choice((1, 2, 4))):
        at, end = sorted(rng.randrange(len(source) + 1) for _ in range(2))
        source = rng.choice(
            (
                source[:at] + rng.choice(pieces) + source[at:],
                source[:at] + source[min(end, at + 20) :],
                source[:end] + source[at:],
            )
        )[:50_000]
    return source
