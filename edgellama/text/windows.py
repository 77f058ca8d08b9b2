"""Windows of tokens from evaluation texts, alternating between the texts so that any number covers all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from edgellama import data
from edgellama.errors import TextError
from edgellama.text.tokenizer import Tokenizer

# Scored positions per window: long enough for the KV cache to matter, short enough for many windows.
WINDOW = 256


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
    return texts


def windows(texts: Sequence[Text], tokenizer: Tokenizer, length: int) -> Iterator[Window]:
    """Windows of `length` scored tokens, from each text in turn until all are used up.

    Each window starts as the tokenizer starts a text, with bos if it adds one. Raises TextError for a text
    that does not fill one window, since its omission would be a surprise.
    """
    streams = []
    for text in texts:
        stream = _windows_of(text, tokenizer, length)
        first = next(stream, None)
        if first is None:
            raise TextError(
                f"the text {text.name} holds fewer than {length + 1} tokens",
                remedy="Give a longer text, or leave it out.",
            )
        streams.append(chain([first], stream))
    while streams:
        for stream in list(streams):
            window = next(stream, None)
            if window is None:
                streams.remove(stream)
            else:
                yield window


def _windows_of(text: Text, tokenizer: Tokenizer, length: int) -> Iterator[Window]:
    start = tokenizer.encode("")  # bos, if the tokenizer adds it
    ids = tokenizer.encode(text.content, add_special_tokens=False)
    step = length + 1 - len(start)
    for i in range(0, len(ids) - step + 1, step):
        tokens = (*start, *ids[i : i + step])
        yield Window(text.name, tokens[:-1], tokens[1:])
