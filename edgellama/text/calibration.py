"""Calibration: windows of text tokens on which calibrated recipes choose their codes.

The windows depend only on the texts' contents, not on the texts' order and names or on the machine.

A model judged on its own calibration text looks better than it is. The two kinds of text are therefore kept
apart from both sides: `calibrate_on` refuses evaluation texts, `refuse_calibration_texts` the reverse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from edgellama import data
from edgellama.errors import TextError
from edgellama.text.overlap import Fingerprints, text_sha256
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import Text, consecutive_windows, default_texts

LENGTH = 256  # tokens per window
MIN_TOKENS = 2048  # fewer tokens give statistics of the text more than of the model
HELD_OUT = 8  # windows
_PHRASE = 80  # characters; two texts do not share so long a line by chance
# Share of an evaluation text's passages that may occur in a calibration text. The texts that ship with
# edgellama share 0.1 %. A licence or a prompt in both is 1 to 2 % of a text of 64 windows.
MOST_SHARED = 0.05


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids, all of one length, sorted by their ids.

    held_out: the next windows of the same texts, to measure on. Short texts have some windows in both.
    texts: name and fingerprints of each text. The gate recognises excerpts by them.
    """

    windows: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[str, Fingerprints], ...]

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
            "texts": [{"name": name, **prints.to_dict()} for name, prints in self.texts],
        }


def calibration_texts() -> list[Text]:
    """Calibration texts that ship with edgellama (edgellama/data/NOTICE)."""
    return [Text(name.rpartition(".")[0], data.read_text(name)) for name in data.CALIBRATION]


def calibrate_on(
    texts: Sequence[Text], tokenizer: Tokenizer, tokens: int, context_length: int
) -> Calibration:
    """Takes about `tokens` tokens from `texts`, a window from each text in turn.

    A window has LENGTH tokens, or `context_length` if that is smaller. Raises TextError for texts that are
    too short. Also raises it for a text that overlaps with the evaluation texts: a model calibrated on these can
    no longer be judged by them.
    """
    _refuse_evaluation_texts(texts)
    length = min(LENGTH, context_length)
    ordered = sorted(texts, key=lambda text: text_sha256(text.content))
    source = consecutive_windows(ordered, tokenizer, length)
    chosen = list(islice(source, -(-tokens // length)))
    token_count = sum(len(window.tokens) for window in chosen)
    if token_count < MIN_TOKENS:
        raise TextError(
            f"calibration: {', '.join(t.name for t in texts)} hold {token_count} tokens in whole windows "
            f"of {length}, and at least {MIN_TOKENS} are needed",
            remedy="Give more text with --calibration, or use a recipe without calibration (int4-fast).",
        )
    named = [(text.name, Fingerprints.of(text.content)) for text in texts]
    return Calibration(
        tuple(sorted(window.tokens for window in chosen)),
        tuple(window.tokens for window in (*islice(source, HELD_OUT), *chosen))[:HELD_OUT],
        tuple(sorted(named, key=lambda row: (row[0], row[1].sha256))),
    )


def refuse_calibration_texts(texts: Sequence[Text], recorded: Sequence[Fingerprints]) -> None:
    """Raises TextError for an evaluation text that overlaps with a calibration text.

    The calibration texts that ship with edgellama are always refused, so that one text can compare all
    recipes.

    texts: evaluation texts. recorded: fingerprints of the texts that the bundle was calibrated on.
    """
    built_in = calibration_texts()
    lines = _long_lines(built_in)
    known = [*recorded, *(Fingerprints.of(text.content) for text in built_in)]
    hashes = {prints.sha256 for prints in known}
    for text in texts:
        shared = _shared_lines(text, lines)
        share = min(1.0, sum({prints.sha256: prints.share_of(text.content) for prints in known}.values()))
        if text_sha256(text.content) in hashes:
            reason = "is a calibration text"
        elif shared:
            reason = f"shares {shared} long lines with the texts that edgellama calibrates on"
        elif share > MOST_SHARED:
            reason = f"shares {share:.0%} of its passages with a text that the model was calibrated on"
        else:
            continue
        raise TextError(
            f"evaluation: {text.name} {reason}",
            remedy="Evaluate on other text: a model judged on its own calibration text looks better than it is.",
        )


def _refuse_evaluation_texts(texts: Sequence[Text]) -> None:
    evaluation = default_texts()
    lines = _long_lines(evaluation)
    for text in texts:
        shared = _shared_lines(text, lines)
        prints = Fingerprints.of(text.content)
        share = max(prints.share_of(other.content) for other in evaluation)
        if not shared and share <= MOST_SHARED:
            continue
        extent = f"{shared} long lines" if shared else f"{share:.0%} of the passages"
        raise TextError(
            f"calibration: {text.name} shares {extent} with the texts that edgellama evaluates on",
            remedy="Calibrate on other text: a model judged on its own calibration text looks better than it is.",
        )


def _long_lines(texts: Sequence[Text]) -> set[str]:
    return {line for text in texts for line in text.content.splitlines() if len(line) >= _PHRASE}


def _shared_lines(text: Text, lines: set[str]) -> int:
    return sum(line in lines for line in text.content.splitlines())
