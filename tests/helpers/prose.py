"""Measures of prose: sentence lengths of pages, and vague words in docstrings and comments of Python."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from markdown_it import MarkdownIt

WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")
# A sentence ends with a mark, space, and a letter or digit that can begin the next one.
BOUNDARY = re.compile(r"(?<=[.!?])[\"'’)]*\s+(?=[\"“(]?[A-Z0-9])")
VAGUE = re.compile(r"what(ever|['’]s)?", re.IGNORECASE)
VAGUE_OPENING = re.compile(r"\W*(what|whatever|how|where|that which)\b", re.IGNORECASE)
DIRECTIVES = ("noqa", "type: ignore", "fmt:")
WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Note:
    """A docstring, or a comment of one or more lines."""

    line: int
    text: str

    @property
    def words(self) -> list[str]:
        return WORD.findall(self.text)

    @property
    def vague_words(self) -> int:
        """Number of "what" and "whatever"."""
        return sum(VAGUE.fullmatch(word) is not None for word in self.words)

    @property
    def has_vague_opening(self) -> bool:
        """True for a beginning such as "what", "how", "where" or "that which"."""
        return VAGUE_OPENING.match(self.text) is not None


def python_notes(source: str) -> list[Note]:
    """Docstrings and comments of a Python file."""
    return [*_docstrings(source), *_comments(source)]


def _docstrings(source: str) -> Iterator[Note]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, WITH_DOCSTRING) and (docstring := ast.get_docstring(node)):
            yield Note(node.body[0].lineno, docstring)


def _comments(source: str) -> Iterator[Note]:
    """Comments without directives. Lines that follow each other are one comment; a comment behind code is its own."""
    first, lines, own_line = 0, list[str](), False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string.lstrip("#! ")
        if token.type != tokenize.COMMENT or text.startswith(DIRECTIVES):
            continue
        line, alone = token.start[0], not token.line[: token.start[1]].strip()
        if not (own_line and alone and line == first + len(lines)):
            if lines:
                yield Note(first, "\n".join(lines))
            first, lines = line, []
        lines.append(text)
        own_line = alone
    if lines:
        yield Note(first, "\n".join(lines))


def vague_rate(notes: Iterable[Note]) -> float:
    """Number of "what" and "whatever" in 1,000 words."""
    notes = list(notes)
    return 1000 * sum(note.vague_words for note in notes) / max(1, sum(len(note.words) for note in notes))


def page_sentences(markdown: str) -> list[str]:
    """Sentences of paragraphs and lists. Headings, tables and code are left out; a code span is one word."""
    sentences: list[str] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    for before, token in pairwise(tokens):
        if before.type == "paragraph_open":
            spans = token.children or []
            text = "".join(
                "X" if span.type == "code_inline" else span.content or " " * ("break" in span.type)
                for span in spans
            )
            sentences += [s for s in BOUNDARY.split(text) if len(WORD.findall(s)) > 1]
    return sentences


def sentence_lengths(markdown: str) -> tuple[float, int]:
    """Median and 90th percentile of the words in a sentence."""
    counts = sorted(len(WORD.findall(sentence)) for sentence in page_sentences(markdown))
    return median(counts), counts[int(0.9 * (len(counts) - 1))]
