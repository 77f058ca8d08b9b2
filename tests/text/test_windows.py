"""Tests of windows: spread over each text, nested, each once, and refusals of text that holds nothing new."""

from __future__ import annotations

import tracemalloc
from itertools import islice
from pathlib import Path

import pytest

from edgellama.checkpoints import Checkpoint
from edgellama.errors import TextError
from edgellama.text import windows as module
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import (
    Text,
    consecutive_windows,
    default_texts,
    read_texts,
    spread,
    windowed,
    windows,
)

LENGTH = 64
NOVEL = default_texts()[0].content


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Checkpoint) -> Tokenizer:
    return tiny_checkpoint.tokenizer


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 105, 174, 1000])
def test_every_number_comes_once(count: int) -> None:
    assert sorted(spread(count)) == list(range(count))
    assert spread(count) == spread(count)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("parts", [2, 4, 8, 16, 32])
def test_every_beginning_is_spread_evenly(parts: int, seed: int) -> None:
    count = 1024
    first = spread(count, seed)[:parts]
    assert sorted(i * parts // count for i in first) == list(range(parts))


def test_every_place_of_a_text_is_as_likely_as_another() -> None:
    counts = [0] * 21
    for seed in range(4000):
        for i in spread(21, seed)[:4]:
            counts[i] += 1
    assert max(counts) < 1.5 * 4000 * 4 / 21 and min(counts) > 0.6 * 4000 * 4 / 21


def test_windows_are_those_of_the_whole_text_in_another_order(tokenizer: Tokenizer) -> None:
    texts = default_texts()
    spread_out = list(windows(texts, tokenizer, LENGTH))
    in_a_row = list(consecutive_windows(texts, tokenizer, LENGTH))
    assert set(spread_out) <= set(in_a_row) and len(spread_out) > 0.98 * len(in_a_row)
    assert [w.domain for w in spread_out[:6]] == [text.name for text in texts] * 3
    assert spread_out[:8] != in_a_row[:8]
    ids = tokenizer.encode(texts[0].content, add_special_tokens=False)
    assert [*in_a_row[0].tokens, in_a_row[0].targets[-1]] == ids[: LENGTH + 1]
    places = sorted(in_a_row.index(w) / len(in_a_row) for w in spread_out[:16:2])
    assert places[0] < 0.2 and places[-1] > 0.5, "the windows cover the text from end to end"


def distinct(texts: list[Text], tokenizer: Tokenizer, length: int = LENGTH) -> list[int]:
    return [len(text.windows) for text in windowed(texts, tokenizer, length)]


def test_a_window_counts_once(tokenizer: Tokenizer) -> None:
    part = NOVEL[:20_000]
    (once,) = distinct([Text("once", part)], tokenizer)
    (four,) = windowed([Text("four", "\n".join([part] * 4))], tokenizer, LENGTH)
    assert abs(len(four.windows) - once) <= 1 and four.repeated > 2.9 * once
    more = Text("more", NOVEL[10_000:30_000])
    first, second = distinct([Text("once", part), more], tokenizer)
    assert first == once and abs(second - once / 2) <= 2


@pytest.mark.parametrize(
    "copy",
    [
        NOVEL[:20_000],
        "Moved by a few words. " + NOVEL[:20_000],
        NOVEL[:20_000].replace("\n", "\r\n"),
        NOVEL[:20_000].upper(),
        NOVEL[5_000:15_000],
        " ".join(word + "," * (i % 3 == 0) for i, word in enumerate(NOVEL[:20_000].split())),
    ],
    ids=["equal", "moved", "line ends", "upper case", "excerpt", "commas"],
)
def test_a_text_given_twice_is_refused(copy: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(TextError, match="the text copy repeats itself, or the texts before it"):
        windowed([Text("first", NOVEL[:20_000]), Text("copy", copy)], tokenizer, LENGTH)


@pytest.mark.parametrize(
    "content",
    [
        "The quick brown fox jumps over the lazy dog and thinks about it.\n" * 500,
        "".join(f"{i}: the quick brown fox jumps over the lazy dog and thinks.\n" for i in range(500)),
        "a" * 20_000,
        "--- *** " * 3_000,
    ],
    ids=["line", "numbered line", "letter", "no letters"],
)
def test_one_line_repeated_is_refused(content: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(TextError, match="repeats itself"):
        windowed([Text("line", content)], tokenizer, 256)


def test_one_line_repeated_fills_short_windows_once(tokenizer: Tokenizer) -> None:
    line = "The quick brown fox jumps over the lazy dog and thinks about it.\n"
    (text,) = windowed([Text("line", line * 500)], tokenizer, 16)
    assert len(text.windows) == 2 and text.repeated > 1000


@pytest.mark.parametrize("length", [7, 8, 16, 128, 256])
def test_sound_text_keeps_its_windows(length: int, tokenizer: Tokenizer) -> None:
    for text in windowed(default_texts(), tokenizer, length):
        assert text.repeated <= 0.06 * len(text.windows)


def test_texts_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "text.txt" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(path.parent.name)
    assert [text.name for text in read_texts(paths)] == ["text", "text (2)"]


def test_a_long_text_is_read_in_pieces(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG_TEXT", 60_000)
    whole = windowed([Text("novel", NOVEL[:60_000])], tokenizer, 16)
    pieces = windowed([Text("novel", NOVEL)], tokenizer, 16)
    assert 0.8 < len(pieces[0].windows) / len(whole[0].windows) < 1.1
    text_of = [tokenizer.decode(window.tokens) for window in islice(pieces[0].windows, 40)]
    places = sorted(NOVEL.find(text[2:20]) for text in text_of)
    assert places[0] < 0.1 * len(NOVEL) and places[-1] > 0.9 * len(NOVEL)


def test_a_tokenizer_without_spans_still_finds_repetition(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_spans(self: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids = self.encode(text, add_special_tokens=False)
        return ids, [(0, 0)] * len(ids)

    monkeypatch.setattr(Tokenizer, "encode_with_spans", without_spans)
    assert sum(distinct(default_texts(), tokenizer)) > 1000
    with pytest.raises(TextError, match="repeats itself"):
        windowed([Text("a", NOVEL), Text("b", NOVEL)], tokenizer, LENGTH)


def test_memory_does_not_grow_with_a_long_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG_TEXT", 100_000)
    numbered = "".join(f"{i} {NOVEL[i % 100_000 : i % 100_000 + 90]}\n" for i in range(0, 2_000_000, 97))
    peaks = []
    for content in (numbered[:100_000], numbered):
        tracemalloc.start()
        windowed([Text("long", content)], tokenizer, LENGTH)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]
