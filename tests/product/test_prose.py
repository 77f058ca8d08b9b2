"""Limits of the prose style: few vague words in docstrings and comments, short sentences in pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.pages import PAGES, page_name
from tests.helpers.paths import ROOT
from tests.helpers.prose import Note, page_sentences, python_notes, sentence_lengths, vague_rate

MAX_VAGUE_RATE = 2.0  # occurrences of "what" and "whatever" in 1,000 words
MAX_MEDIAN = 12  # words in a sentence
MAX_P90 = 25

BAD_PYTHON = '''"""What the file is about, whatever that is."""

# noqa: E402
# How it goes
# and whatever
x = 1  # where it lies
# type: ignore
# Number of items.


def f():
    """That which is counted, and what's left."""
'''
GOOD_PYTHON = '''"""Sum of the parts. Nobody asks what it costs."""


class Part:
    """A part, such as `what`."""  # Unit: bytes.

    size = "how # what"
'''
BAD_PAGE = """# A title that nobody counts although it has a great many words in it

The sentence which stands here goes on and on, because its author, who had much to say about a lot of things,
never found the place at which a reader would have liked to stop and breathe. It has one `code span` in it.

| what | is in a table |
|---|---|
| is left out | of everything |
"""
GOOD_PAGE = """The gate runs the file. It decides at once.

- One fault is enough. **Two** are [worse](page.md).
- Stop.

```bash
a command with many words that nobody counts as a sentence of the page
```
"""


def package_notes() -> dict[str, list[Note]]:
    """Docstrings and comments by path. edgellama/export and edgellama/runtimes are links to the other two folders."""
    files = [f for folder in ("edgellama", "export", "runtimes") for f in (ROOT / folder).rglob("*.py")]
    links = (ROOT / "edgellama/export", ROOT / "edgellama/runtimes")
    files = [file for file in files if not any(file.is_relative_to(link) for link in links)]
    return {page_name(file): python_notes(file.read_text(encoding="utf-8")) for file in sorted(files)}


def places(notes: dict[str, list[Note]], *, opening: bool) -> list[str]:
    """Path, line and beginning of each note that opens with a vague word, or has one anywhere."""
    return [
        f"{path}:{note.line}: {' '.join(note.text.split())[:80]}"
        for path, file_notes in notes.items()
        for note in file_notes
        if (note.has_vague_opening if opening else note.vague_words)
    ]


def test_docstrings_and_comments_have_few_vague_words() -> None:
    notes = package_notes()
    rate = vague_rate(note for file_notes in notes.values() for note in file_notes)
    assert rate < MAX_VAGUE_RATE, "\n".join([f"{rate:.2f} in 1,000 words", *places(notes, opening=False)])


def test_docstrings_and_comments_begin_with_a_noun_or_a_verb() -> None:
    vague = places(package_notes(), opening=True)
    assert not vague, "\n".join(vague)


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_sentences_of_pages_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    middle, p90 = sentence_lengths(text)
    assert middle <= MAX_MEDIAN and p90 <= MAX_P90, max(page_sentences(text), key=len)


def test_the_counter_finds_bad_python() -> None:
    notes = python_notes(BAD_PYTHON)
    assert [note.line for note in notes] == [1, 12, 4, 6, 8]
    assert [note.has_vague_opening for note in notes] == [True, True, True, True, False]
    assert [note.vague_words for note in notes] == [2, 1, 1, 0, 0]
    assert vague_rate(notes) == 1000 * 4 / sum(len(note.words) for note in notes)


def test_the_counter_accepts_good_python() -> None:
    notes = python_notes(GOOD_PYTHON)
    assert [note.text.split()[0] for note in notes] == ["Sum", "A", "Unit:"]
    assert not any(note.has_vague_opening for note in notes)
    assert sum(note.vague_words for note in notes) == 2


def test_the_counter_measures_sentences() -> None:
    long_sentence, short_sentence = page_sentences(BAD_PAGE)
    assert short_sentence == "It has one X in it."
    assert sentence_lengths(BAD_PAGE)[0] == (len(long_sentence.split()) + 6) / 2 > MAX_MEDIAN
    assert page_sentences(GOOD_PAGE) == [
        "The gate runs the file.",
        "It decides at once.",
        "One fault is enough.",
        "Two are worse.",
    ]
    assert sentence_lengths(GOOD_PAGE) == (4, 4)
