"""Markdown pages of the repository: fences, code spans, links, anchors, and the shell commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.helpers.paths import ROOT

README = ROOT / "README.md"
DOCS = ROOT / "edgellama/docs"
TOPICS = sorted(DOCS.glob("*.md"))
PAGES = [
    README,
    *TOPICS,
    ROOT / ".github/CONTRIBUTING.md",
    ROOT / ".github/SECURITY.md",
    *(ROOT / folder / "README.md" for folder in ("android_demo", "export", "ios_demo", "runtimes", "tests")),
]


@dataclass(frozen=True)
class Page:
    """A parsed page. Fences in lists count, and so do code spans in tables."""

    path: Path
    text: str

    @cached_property
    def _tokens(self) -> list[Token]:
        return MarkdownIt("commonmark").enable("table").parse(self.text)

    @cached_property
    def _inline(self) -> list[Token]:
        return [child for token in self._tokens for child in token.children or ()]

    def fences(self, language: str) -> list[str]:
        """Contents of the fenced blocks in a language, in order."""
        return [token.content for token in self._tokens if token.type == "fence" and token.info == language]

    @cached_property
    def code_spans(self) -> list[str]:
        return [token.content for token in self._inline if token.type == "code_inline"]

    @cached_property
    def links(self) -> list[str]:
        return [str(token.attrs["href"]) for token in self._inline if token.type == "link_open"]

    @cached_property
    def headings(self) -> list[str]:
        return [token.content for before, token in pairwise(self._tokens) if before.type == "heading_open"]

    @cached_property
    def anchors(self) -> set[str]:
        """Anchors that GitHub gives the headings. A repeated heading gets a number."""
        anchors: set[str] = set()
        for heading in self.headings:
            slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            repeats = (f"{slug}-{n}" for n in range(1, 100))
            anchors.add(next(repeats) if slug in anchors else slug)
        return anchors

    @cached_property
    def commands(self) -> list[list[str]]:
        """Words of every command in `bash` fences, and behind `$ ` in `text` fences."""
        prompts = (re.findall(r"^\$ (.*)", fence, re.MULTILINE) for fence in self.fences("text"))
        scripts = [*self.fences("bash"), *("\n".join(lines) for lines in prompts)]
        return [command for script in scripts for command in split_commands(script)]

    @cached_property
    def edgellama_commands(self) -> list[list[str]]:
        """Arguments of every `edgellama` command, from any environment's `bin`."""
        return [words[1:] for words in self.commands if Path(words[0]).name == "edgellama"]


def read_page(path: Path) -> Page:
    return Page(path, path.read_text(encoding="utf-8"))


def page_name(path: Path) -> str:
    """Path of a page below the root, as the id of a test."""
    return path.relative_to(ROOT).as_posix()


def split_commands(script: str) -> Iterator[list[str]]:
    """Words of each simple command. Continued lines are joined; comments, assignments and `...` are left out."""
    script = script.replace("\\\n", " ").replace("\n", "\n\n")  # A comment takes one end of its line with it.
    lexer = shlex.shlex(script, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split = " \t\r", True
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if set(word) <= set(";&|\n"):
            if words:
                yield words
            words = []
        elif word not in ("...", "…") and (words or not re.match(r"\w+=", word)):
            words.append(word)
