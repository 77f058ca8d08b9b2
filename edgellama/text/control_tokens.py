"""Control tokens in a text: those of a template, and those that somebody typed.

A template writes control tokens such as `<|im_end|>`. A person who types the same characters means text: taken for
a token, it would end the turn and could forge another one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from edgellama.text.tokenizer import Tokenizer

_PRIVATE_USE = range(0xE000, 0xF900)  # characters that no text should hold


def control_tokens(tokenizer: Tokenizer) -> list[str]:
    """Texts of the control tokens, longest first."""
    tokens = json.loads(tokenizer.files["tokenizer.json"]).get("added_tokens") or ()
    return sorted((t["content"] for t in tokens if t.get("special")), key=len, reverse=True)


def encode_parts(tokenizer: Tokenizer, parts: Sequence[str]) -> list[int]:
    """Token ids of the joined parts, with the special tokens that the tokenizer adds.

    The parts are one text to the tokenizer, so a token may cross their borders. A control token is text if a
    character of it lies in a typed part.

    parts: texts of a template at even places, typed texts at odd ones.
    """
    text, controls = "".join(parts), control_tokens(tokenizer)
    if not any(_touches(control, text, span) for control in controls for span in _typed_spans(parts)):
        return tokenizer.encode(text)
    (mark,) = unused_characters([text, *tokenizer.added_tokens], 1)
    names = {control: f"{mark}{number}{mark}" for number, control in enumerate(controls)}
    named = "".join(part if place % 2 else replaced(part, names) for place, part in enumerate(parts))
    plain, added = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    start = next(n for n in range(len(added)) if added[n : n + len(plain)] == plain)
    return [*added[:start], *renamed(tokenizer, names).encode(named), *added[start + len(plain) :]]


def _typed_spans(parts: Sequence[str]) -> Iterator[range]:
    """Places of the characters of each typed part in the joined text."""
    start = 0
    for place, part in enumerate(parts):
        if place % 2 and part:
            yield range(start, start + len(part))
        start += len(part)


def _touches(control: str, text: str, span: range) -> bool:
    """True if `control` occurs in `text` with a character in `span`."""
    return control in text[max(0, span.start - len(control) + 1) : span.stop + len(control) - 1]


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
