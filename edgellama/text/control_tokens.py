"""Control tokens in a text: those of a template, and those that somebody typed.

A template writes control tokens such as `<|im_end|>`. A person who types the same characters means text: taken for
a token, it would end the turn and could forge another one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

from edgellama.text.tokenizer import Tokenizer

Part = tuple[str, bool]  # a text, and whether a person or a model typed it
_PRIVATE_USE = range(0xE000, 0xF900)  # characters that no text should hold


def control_tokens(tokenizer: Tokenizer) -> list[str]:
    """Texts of the control tokens, longest first."""
    tokens = json.loads(tokenizer.files["tokenizer.json"]).get("added_tokens") or ()
    return sorted((t["content"] for t in tokens if t.get("special")), key=len, reverse=True)


def encode_parts(tokenizer: Tokenizer, parts: Sequence[Part]) -> list[int]:
    """Token ids of the joined parts, with the special tokens that the tokenizer adds.

    The parts are one text to the tokenizer, so a token may cross their borders. A control token is text if a part of
    it is typed.
    """
    text, controls = "".join(part for part, _ in parts), control_tokens(tokenizer)
    ends = [0, *accumulate(len(part) for part, _ in parts)]
    typed = [span for span, (_, is_typed) in zip(pairwise(ends), parts, strict=True) if is_typed]
    if not any(_touches(control, text, *span) for control in controls for span in typed):
        return tokenizer.encode(text)
    (mark,) = unused_characters([text, *tokenizer.added_tokens], 1)
    names = {control: f"{mark}{number}{mark}" for number, control in enumerate(controls)}
    named = "".join(part if is_typed else replaced(part, names) for part, is_typed in parts)
    plain, added = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    start = next(n for n in range(len(added)) if added[n : n + len(plain)] == plain)
    return [*added[:start], *renamed(tokenizer, names).encode(named), *added[start + len(plain) :]]


def _touches(control: str, text: str, start: int, end: int) -> bool:
    """True if `control` occurs in `text` with a character from `start` to `end`."""
    reach = len(control) - 1
    return end > start and control in text[max(0, start - reach) : end + reach]


def unused_characters(texts: Sequence[str], count: int) -> Iterator[str]:
    """`count` characters that none of the texts holds."""
    taken = set().union(*texts)
    unused = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
    return (next(unused) for _ in range(count))


def replaced(text: str, replacements: Mapping[str, str]) -> str:
    """The text with all replacements made in one pass. Of two keys at a place, the first wins."""
    pattern = "|".join(map(re.escape, replacements))
    return re.sub(pattern, lambda match: replacements[match[0]], text)


def renamed(tokenizer: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """The tokenizer with other texts for its control tokens, and the same ids."""
    data = json.loads(tokenizer.files["tokenizer.json"])
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocab = data["model"].get("vocab")
    if isinstance(vocab, dict):
        data["model"]["vocab"] = {names.get(text, text): token for text, token in vocab.items()}
    elif isinstance(vocab, list):  # Unigram: pairs of text and score
        data["model"]["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    data["post_processor"] = None  # it names control tokens, and adds those that a chat brings itself
    return Tokenizer({**tokenizer.files, "tokenizer.json": json.dumps(data).encode()})
