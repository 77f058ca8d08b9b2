"""Syntax trees of the Swift files of ios_demo: parse errors, and the texts of string literals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import tree_sitter
import tree_sitter_swift

from tests.helpers.paths import ROOT

DEMO = ROOT / "ios_demo"
CORE = DEMO / "EdgeLlamaCore/Sources/EdgeLlamaCore"
_PARSER = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))


def swift_files() -> list[Path]:
    """Swift files of the app, the core and the stubs of the tests."""
    return sorted([*DEMO.rglob("*.swift"), *(ROOT / "tests/apps/ios_stubs").glob("*.swift")])


def errors(source: bytes) -> list[str]:
    """Parse errors, each as `line: start of the text`."""
    return [
        f"{node.start_point.row + 1}: {node.text!r:.60}"
        for node in _nodes(_PARSER.parse(source).root_node)
        if node.is_error or node.is_missing
    ]


def strings(path: Path) -> set[str]:
    """String literals of one line without interpolation or escapes."""
    texts = set()
    for node in _nodes(_PARSER.parse(path.read_bytes()).root_node):
        if node.type == "line_string_literal" and all(c.type == "line_str_text" for c in node.named_children):
            texts.add("".join((c.text or b"").decode() for c in node.named_children))
    return texts


def constants(path: Path) -> dict[str, str]:
    """Texts of `let name: String = "text"` declarations, by name."""
    texts = {}
    for node in _nodes(_PARSER.parse(path.read_bytes()).root_node):
        if node.type != "property_declaration":
            continue
        name, value = node.child_by_field_name("name"), node.child_by_field_name("value")
        if name is not None and value is not None and value.type == "line_string_literal":
            texts[(name.text or b"").decode()] = (value.text or b"").decode().strip('"')
    return texts


def _nodes(node: tree_sitter.Node) -> Iterator[tree_sitter.Node]:
    yield node
    for child in node.children:
        yield from _nodes(child)
