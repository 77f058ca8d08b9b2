"""Tokens of a challenge: they follow from its nonce, so that nobody can choose them or know them before.

Passages begin anywhere in the evaluation texts and have random numbers between their words. Others are random
numbers alone, because some GPU kernels corrupt digits at depth and leave prose fluent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from edgellama.bundle.golden import GoldenSequence
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import Text

SCORED = 16  # positions of a sequence, its last ones
PASSAGES = {
    "passage of 16": 16,
    "passage of 48": 48,
    "passage of 128": 128,
    "numbers of 48": 48,
    "numbers of 128": 128,
    "numbers of 512": 512,
}  # tokens
_WORDS_BETWEEN_NUMBERS = 9
_SEPARATORS = (" ", ", ", " + ", "\n", ". ", " = ")


class Draws:
    """Numbers that follow from a nonce, equal on every machine.

    >>> Draws("00" * 32).below(1000) == Draws("00" * 32).below(1000)
    True
    """

    def __init__(self, nonce: str) -> None:
        self._state = hashlib.sha256(bytes.fromhex(nonce)).digest()

    def below(self, limit: int) -> int:
        """A number from 0 to `limit` - 1."""
        self._state = hashlib.sha256(self._state).digest()
        return int.from_bytes(hashlib.sha256(b"draw" + self._state).digest()[:16], "little") % limit


def draw_sequences(
    nonce: str, tokenizer: Tokenizer, texts: Sequence[Text], context_length: int
) -> list[GoldenSequence]:
    """Sequences for a model with this tokenizer, at most `context_length` tokens each.

    nonce: 64 hexadecimal digits.
    """
    draws = Draws(nonce)
    sequences = []
    for name, length in PASSAGES.items():
        count = min(length, context_length)
        content = _numbers(draws, count) if name.startswith("numbers") else _passage(draws, texts, count)
        tokens = tuple(tokenizer.encode(content)[:count])
        sequences.append(GoldenSequence(name, content, True, None, tokens, max(0, len(tokens) - SCORED)))
    return sequences


def _passage(draws: Draws, texts: Sequence[Text], count: int) -> str:
    """Words of a text from a random one on, at least `count`, with a random number after every few."""
    words = texts[draws.below(len(texts))].content.split()
    start = draws.below(max(1, len(words) - count))
    passage = []
    for i, word in enumerate(words[start : start + count]):
        if i % _WORDS_BETWEEN_NUMBERS == 0:
            passage.append(str(draws.below(10 ** (1 + draws.below(7)))))
        passage.append(word)
    return " ".join(passage)


def _numbers(draws: Draws, count: int) -> str:
    """Random numbers, at least `count`, with signs between them."""
    parts = []
    for _ in range(count):
        parts += [str(draws.below(10 ** (1 + draws.below(9)))), _SEPARATORS[draws.below(len(_SEPARATORS))]]
    return "".join(parts)
