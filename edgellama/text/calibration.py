"""Calibration: text -> the windows of tokens on which calibrated recipes choose their codes.

What is taken depends on the texts' contents alone: not on their order, their names, or the machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from edgellama import data
from edgellama.errors import TextError
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import Text, default_texts, windows

LENGTH = 256  # tokens of a window
MIN_TOKENS = 2048  # statistics of fewer say more about the text than about the model
HELD_OUT = 8  # windows
_PHRASE = 80  # characters: a line this long is not in two texts by chance


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids, all of one length, in the order of their contents.

    held_out: the next windows of the same texts, to measure on; of a short text some that were used. texts: name and
    sha256 of each.
    """

    windows: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[str, str], ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.windows))

    @property
    def sha256(self) -> str:
        """Hash of the token ids."""
        return hashlib.sha256(repr(self.windows).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What an export report says about it."""
        return {
            "tokens": self.tokens,
            "windows": len(self.windows),
            "sha256": self.sha256,
            "texts": [{"name": name, "sha256": sha256} for name, sha256 in self.texts],
        }


def calibration_texts() -> list[Text]:
    """The calibration texts that ship with edgellama (edgellama/data/NOTICE)."""
    return [Text(name.rpartition(".")[0], data.read_text(name)) for name in data.CALIBRATION]


def calibrate_on(
    texts: Sequence[Text], tokenizer: Tokenizer, tokens: int, context_length: int
) -> Calibration:
    """About `tokens` tokens of `texts`, the texts in turn. A window is shorter than LENGTH where the context is.

    Raises TextError for texts that are too short, and for one that shares lines with the evaluation texts: what was
    calibrated on them can no longer be judged by them.
    """
    _check_overlap(texts)
    length = min(LENGTH, context_length)
    ordered = sorted(texts, key=lambda text: _sha256(text))
    source = windows(ordered, tokenizer, length)
    taken = list(islice(source, -(-tokens // length)))
    found = sum(len(window.tokens) for window in taken)
    if found < MIN_TOKENS:
        raise TextError(
            f"calibration: {', '.join(t.name for t in texts)} hold {found} tokens in whole windows of {length}, and "
            f"at least {MIN_TOKENS} are needed",
            remedy="Give more text with --calibration, or use a recipe without calibration (int4-fast).",
        )
    return Calibration(
        tuple(sorted(window.tokens for window in taken)),
        tuple(window.tokens for window in (*islice(source, HELD_OUT), *taken))[:HELD_OUT],
        tuple(sorted((text.name, _sha256(text)) for text in texts)),
    )


def _check_overlap(texts: Sequence[Text]) -> None:
    known = {line for text in default_texts() for line in text.content.splitlines() if len(line) >= _PHRASE}
    for text in texts:
        shared = sum(line in known for line in text.content.splitlines())
        if shared:
            raise TextError(
                f"calibration: {text.name} shares {shared} long lines with the texts that edgellama evaluates on",
                remedy="Calibrate on other text: a model judged on its own calibration text looks better than it is.",
            )


def _sha256(text: Text) -> str:
    return hashlib.sha256(text.content.encode("utf-8", "surrogatepass")).hexdigest()
