"""Windows of tokens from evaluation texts, spread over every text and taken from the texts in turn.

Any number of windows covers all texts from end to end, and more windows lie between those. Neighbours are
alike, so consecutive windows from the beginning of a text would know less about it than their spread shows.
A window that repeats earlier text is left out, because it measures nothing new.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from edgellama import data
from edgellama.errors import TextError
from edgellama.text.overlap import repeated_letters
from edgellama.text.tokenizer import Tokenizer

# Scored positions per window: long enough for the KV cache to matter, short enough for many windows.
WINDOW = 256
# Share of a window's letters in passages that occurred before, above which the window does not count. The
# windows of edgellama's own texts stay below 0.4.
MOST_REPEATED = 0.5
# Characters of a text that are read as a whole. Of a longer one, pieces of that size in all are.
LONG_TEXT = 4_000_000


@dataclass(frozen=True)
class Text:
    """Text with the name of its domain, which reports show."""

    name: str
    content: str


@dataclass(frozen=True)
class Window:
    """Input `tokens` and the `targets` that they predict, position by position; both have the same length."""

    domain: str
    tokens: tuple[int, ...]
    targets: tuple[int, ...]


def default_texts() -> list[Text]:
    """Evaluation texts that ship with edgellama (edgellama/data/NOTICE)."""
    return [Text(name.rpartition(".")[0], data.read_text(name)) for name in data.EVALUATION]


def read_texts(paths: Sequence[Path]) -> list[Text]:
    """Reads the user's own texts. Raises TextError for a file that is missing, empty or not UTF-8."""
    texts = []
    for path in paths:
        try:
            content = path.read_text(encoding="utf-8")
        except OSError as error:
            raise TextError(f"{path}: {error.strerror}", remedy="Check the path of the text.") from error
        except UnicodeDecodeError as error:
            raise TextError(
                f"{path}: not UTF-8 ({error.reason} at byte {error.start})", remedy="Save the text as UTF-8."
            ) from error
        if not content.strip():
            raise TextError(f"{path}: the text is empty", remedy="Give a text of a few thousand words.")
        texts.append(Text(path.stem, content))
    return _with_distinct_names(texts)


def _with_distinct_names(texts: Sequence[Text]) -> list[Text]:
    """The texts with a number after a name that occurred before. Reports tell texts apart by name."""
    counts, named = Counter[str](), []
    for text in texts:
        counts[text.name] += 1
        number = counts[text.name]
        named.append(text if number == 1 else Text(f"{text.name} ({number})", text.content))
    return named


@dataclass(frozen=True)
class WindowedText:
    """Windows of one text.

    Attributes:
        name: name of the text.
        windows: in the order in which they are scored.
        repeated: number of windows that were left out, because they repeat earlier text.
    """

    name: str
    windows: tuple[Window, ...]
    repeated: int


def windows(texts: Sequence[Text], tokenizer: Tokenizer, length: int) -> Iterator[Window]:
    """Windows of `length` scored tokens, from each text in turn until all are used up.

    Each window starts as the tokenizer starts a text, with bos if it adds one. Raises TextError for a text
    that does not give one window, since its omission would be a surprise.
    """
    return in_turn(windowed(texts, tokenizer, length))


def in_turn(texts: Sequence[WindowedText]) -> Iterator[Window]:
    """Windows of each text in turn until all are used up."""
    rounds = zip_longest(*(text.windows for text in texts))
    return (window for window in chain.from_iterable(rounds) if window is not None)


def windowed(texts: Sequence[Text], tokenizer: Tokenizer, length: int) -> list[WindowedText]:
    """Windows of each text, without those that repeat earlier text.

    Raises TextError for a text that does not fill one window, and for one without a window of its own.
    """
    pieces = [_pieces(text.content, length) for text in texts]
    counts = iter(repeated_letters([piece for parts in pieces for piece in parts]))
    result = []
    for text, parts in zip(texts, pieces, strict=True):
        chosen: list[Window] = []
        total = 0
        for part in parts:
            letters, repeated = next(counts)
            for window, (first, last) in _spans_of(text.name, part, tokenizer, length):
                total += 1
                size = letters[last] - letters[first]
                if size and repeated[last] - repeated[first] <= MOST_REPEATED * size:
                    chosen.append(window)
        if not total:
            raise TextError(
                f"the text {text.name} holds fewer than {length + 1} tokens",
                remedy="Give a longer text, or leave it out.",
            )
        if not chosen:
            raise TextError(
                f"the text {text.name} repeats itself, or the texts before it: none of its {total} windows is new",
                remedy="Give other text, or leave it out: text that is read twice measures nothing more.",
            )
        order = spread(len(chosen))
        result.append(WindowedText(text.name, tuple(chosen[i] for i in order), total - len(chosen)))
    return result


def consecutive_windows(texts: Sequence[Text], tokenizer: Tokenizer, length: int) -> Iterator[Window]:
    """Windows of `length` scored tokens from the beginning of each text, in turn. Calibration reads these.

    Raises TextError for a text that does not fill one window.
    """
    rows = []
    for text in texts:
        row = [window for window, _ in _spans_of(text.name, text.content, tokenizer, length)]
        if not row:
            raise TextError(
                f"the text {text.name} holds fewer than {length + 1} tokens",
                remedy="Give a longer text, or leave it out.",
            )
        rows.append(WindowedText(text.name, tuple(row), 0))
    return in_turn(rows)


def spread(count: int, seed: int = 0) -> list[int]:
    """The numbers below `count` in an order whose every beginning is spread evenly.

    The first n numbers lie one in each n-th, where n is a power of two. Their places within it are random,
    so that no period of a text can meet them.

    >>> spread(8)
    [4, 1, 7, 3, 5, 0, 6, 2]
    """
    generator = random.Random(seed)

    def ordered(first: int, last: int) -> list[int]:
        if last - first < 2:
            return list(range(first, last))
        middle = (first + last) // 2
        halves = [ordered(first, middle), ordered(middle, last)]
        if generator.random() * (last - first) >= middle - first:
            halves.reverse()
        return [i for pair in zip_longest(*halves) for i in pair if i is not None]

    return ordered(0, count)


def _pieces(content: str, length: int) -> list[str]:
    """The text, or pieces from line starts all over a long text, which hold a few windows each."""
    if len(content) <= LONG_TEXT:
        return [content]
    size = max(2048, 16 * length)
    count = LONG_TEXT // size
    pieces = []
    for i in range(count):
        start = i * len(content) // count
        line = content.find("\n", start, start + size) + 1
        pieces.append(content[line or start : (line or start) + size])
    return pieces


def _spans_of(
    name: str, content: str, tokenizer: Tokenizer, length: int
) -> Iterator[tuple[Window, tuple[int, int]]]:
    """Consecutive windows of a text, each with its first character and the one after its last."""
    start = tokenizer.encode("")  # bos, if the tokenizer adds it
    ids, spans = tokenizer.encode_with_spans(content)
    step = length + 1 - len(start)
    for i in range(0, len(ids) - step + 1, step):
        tokens = (*start, *ids[i : i + step])
        first, last = spans[i][0], spans[i + step - 1][1]
        if last <= first:  # a tokenizer that keeps no spans
            first, last = (len(content) * n // len(ids) for n in (i, i + step))
        yield Window(name, tokens[:-1], tokens[1:]), (first, last)
