"""Listing of a lowered program: its instructions in order, with every value that decides what they compute.

Names and numbers that a compiler chooses are left out. So two versions of a tool that lower alike give equal
listings of unequal bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

_LONGEST = 160  # characters of a value in a message


@dataclass(frozen=True)
class Item:
    """One entry, such as an instruction.

    Attributes:
        place: Words for people, such as `instruction 12 of forward`. Not compared.
        kind: Operator or part.
        fields: Text of each argument or attribute, by name.
    """

    place: str
    kind: str
    fields: Mapping[str, str]


Listing = Sequence[Item]


def first_difference(actual: Listing, expected: Listing) -> str | None:
    """Words about the first entry that differs; None for equal listings.

    >>> sound = [Item("node 0", "Add", {"inputs": "x, y"})]
    >>> first_difference([Item("node 0", "Add", {"inputs": "x, x"})], sound)
    'node 0 (Add): inputs is x, x, expected x, y'
    """
    for index, (a, b) in enumerate(zip_longest(actual, expected)):
        if a is None:
            return f"{b.place} ({b.kind}) is missing"
        if b is None:
            return f"{a.place} ({a.kind}) is one too many"
        if a.kind != b.kind:
            kinds = [item.kind for item in actual[index : index + 2]]
            if kinds[1:] == [b.kind]:
                return f"{a.place} ({a.kind}) is one too many"
            return f"{a.place} is {a.kind}, expected {b.kind}"
        for name in dict.fromkeys((*b.fields, *a.fields)):
            one, other = (item.fields.get(name, "nothing") for item in (a, b))
            if one != other:
                return f"{a.place} ({a.kind}): {name} is {_short(one, other)}, expected {_short(other, one)}"
    return None


def digest(data: bytes | memoryview) -> str:
    """Short hash of a constant's bytes."""
    return hashlib.sha256(data).hexdigest()[:24]


def _short(text: str, other: str) -> str:
    """The text, or the part of a long one around its first difference from `other`."""
    if len(text) <= _LONGEST:
        return text
    start = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), len(other))
    begin = max(0, min(start - _LONGEST // 4, len(text) - _LONGEST))
    return f"{'…' if begin else ''}{text[begin : begin + _LONGEST]}…"
