"""Calibration: windows of text tokens on which calibrated recipes choose their codes.

The windows depend only on the texts' contents, not on the texts' order and names or on the machine.
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

LENGTH = 256  # tokens per window
MIN_TOKENS = 2048  # fewer tokens give statistics of the text more than of the model
HELD_OUT = 8  # windows
_PHRASE = 80  # characters; two texts do not share so long a line by chance


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids, all of one length, sorted by their ids.

    held_out: the next windows of the same texts, to measure on. Short texts have some windows in both.
    texts: name and sha256 of each text.
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
        """Calibration as recorded in an export report."""
        return {
            "tokens": self.tokens,
            "windows": len(self.windows),
            "sha256": self.sha256,
            "texts": [{"name": name, "sha256": sha256} for name, sha256 in self.texts],
        }


def calibration_texts() -> list[Text]:
    """Calibration texts that ship with edgellama (edgellama/data/NOTICE)."""
    return [Text(name.rpartition(".")[0], data.read_text(name)) for name in data.CALIBRATION]


def calibrate_on(
    texts: Sequence[Text], tokenizer: Tokenizer, tokens: int, context_length: int
) -> Calibration:
    """Takes about `tokens` tokens from `texts`, a window from each text in turn.

    A window has LENGTH tokens, or `context_length` if that is smaller. Raises TextError for texts that are
    too short. Also raises it for a text that shares lines with the evaluation texts: a model calibrated on
    these can no longer be judged by them.
    """
    _check_overlap(texts)
    length = min(LENGTH, context_length)
    ordered = sorted(texts, key=lambda text: _sha256(text))
    source = windows(ordered, tokenizer, length)
    chosen = list(islice(source, -(-tokens // length)))
    token_count = sum(len(window.tokens) for window in chosen)
    if token_count < MIN_TOKENS:
        raise TextError(
            f"calibration: {', '.join(t.name for t in texts)} hold {token_count} tokens in whole windows "
            f"of {length}, and at least {MIN_TOKENS} are needed",
            remedy="Give more text with --calibration, or use a recipe without calibration (int4-fast).",
        )
    return Calibration(
        tuple(sorted(window.tokens for window in chosen)),
        tuple(window.tokens for window in (*islice(source, HELD_OUT), *chosen))[:HELD_OUT],
        tuple(sorted((text.name, _sha256(text)) for text in texts)),
    )


def _check_overlap(texts: Sequence[Text]) -> None:
    evaluation_lines = {
        line for text in default_texts() for line in text.content.splitlines() if len(line) >= _PHRASE
    }
    for text in texts:
        shared = sum(line in evaluation_lines for line in text.content.splitlines())
        if shared:
            raise TextError(
                f"calibration: {text.name} shares {shared} long lines with the texts that edgellama evaluates on",
                remedy="Calibrate on other text: a model judged on its own calibration text looks better than it is.",
            )


def _sha256(text: Text) -> str:
    return hashlib.sha256(text.content.encode("utf-8", "surrogatepass")).hexdigest()
