"""Tests of repeated passages and of fingerprints, on the texts that ship with edgellama."""

from __future__ import annotations

import random

import pytest

from edgellama.text.calibration import calibration_texts
from edgellama.text.overlap import MOST_PRINTS, Fingerprints, repeated_letters
from edgellama.text.windows import default_texts

NOVEL, TUTORIAL = (text.content for text in calibration_texts())


def repeated_share(texts: list[str]) -> list[float]:
    """Share of each text's letters in passages that occurred before."""
    return [float(counts[1, -1] / counts[0, -1]) for counts in repeated_letters(texts)]


def shuffled_lines(text: str, width: int | None = None) -> str:
    lines = text.splitlines()
    if width is not None:
        lines = [line[i : i + width] for line in lines for i in range(0, len(line), width)]
    random.Random(0).shuffle(lines)
    return "\n".join(lines)


def test_a_text_repeats_itself_from_the_second_time_on() -> None:
    line = "It is a truth universally acknowledged, that a window counts once. "
    (counts,) = repeated_letters([line * 10])
    assert counts.shape == (2, len(line) * 10 + 1)
    assert counts[1, len(line)] == 0, "the first time is new"
    letters = sum(c.isalnum() for c in line)
    assert counts[0].tolist()[-1] == 10 * letters and counts[1, -1] == 9 * letters
    assert repeated_share(["short", "short"]) == [0.0, 0.0]
    assert repeated_share([NOVEL, "", TUTORIAL][::2])[1] < 0.1


def test_texts_that_ship_with_edgellama_hardly_repeat_themselves() -> None:
    contents = [text.content for text in (*default_texts(), *calibration_texts())]
    assert max(repeated_share(contents)) < 0.06


@pytest.mark.parametrize(
    "copy",
    [
        NOVEL,
        NOVEL[20_000:60_000],
        "A line before. " + NOVEL,
        NOVEL.upper(),
        NOVEL.replace("\n", "\r\n"),
        " ".join(NOVEL.split()),
        shuffled_lines(NOVEL),
    ],
    ids=["equal", "excerpt", "shifted", "upper case", "line ends", "unwrapped", "lines shuffled"],
)
def test_a_copy_is_recognised(copy: str) -> None:
    assert repeated_share([NOVEL, copy])[1] > 0.95
    prints = Fingerprints.of(NOVEL)
    assert prints.share_of(copy) > 0.8
    assert len(prints.prints) <= MOST_PRINTS


def test_short_lines_in_another_order_are_recognised() -> None:
    assert Fingerprints.of(TUTORIAL).share_of(shuffled_lines(TUTORIAL, 60)) > 0.15


def test_other_texts_share_next_to_nothing() -> None:
    for text in calibration_texts():
        prints = Fingerprints.of(text.content)
        assert all(prints.share_of(other.content) < 0.01 for other in default_texts())


def test_fingerprints_are_of_one_size_and_hold_no_text() -> None:
    generator = random.Random(0)
    long = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz   ", k=1_500_000))
    assert 512 < len(Fingerprints.of(long).prints) <= MOST_PRINTS
    assert Fingerprints.of(long).share_of(long[700_000:760_000]) > 0.9
    data = Fingerprints.of(NOVEL).to_dict()
    assert Fingerprints.from_dict(data) == Fingerprints.of(NOVEL)
    assert set(data["fingerprints"]["prints"]) <= set("0123456789abcdef")
    # The text's own hash is the key: two texts with a passage in common have no print in common.
    assert not Fingerprints.of(NOVEL).prints & Fingerprints.of(NOVEL + "!").prints


@pytest.mark.parametrize(
    "change",
    [{"sampling": 3}, {"sampling": 0}, {"prints": "abc"}, {"sampling": "x"}],
)
def test_fingerprints_of_another_form_are_refused(change: dict[str, object]) -> None:
    data = Fingerprints.of(NOVEL).to_dict()
    data["fingerprints"] |= change
    with pytest.raises(ValueError):
        Fingerprints.from_dict(data)
    with pytest.raises(ValueError):
        Fingerprints.from_dict(Fingerprints.of(NOVEL).to_dict() | {"sha256": "00"})
