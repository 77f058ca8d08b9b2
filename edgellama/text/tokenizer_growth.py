"""How much longer a tokenizer.json may make a text: one of a stranger could double it in each of a hundred steps.

`tokenizers` runs the steps that the file lists, whatever they are, and has no limit of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgellama.errors import TokenizerError

MAX_STEPS = (
    32  # of the normalizer, the pre-tokenizer, the post-processor and the decoder, each; usual are three
)
MAX_GROWTH = 32.0  # characters made of one
_LISTS = ("normalizers", "pretokenizers", "processors", "decoders")
# What a step can make of one character: Unicode's longest decomposition, and a byte of UTF-8 as a letter.
_GROWTH = {"NFKC": 18.0, "NFKD": 18.0, "NFC": 3.0, "NFD": 4.0, "ByteLevel": 4.0, "Precompiled": 18.0}
_ONCE = frozenset(_GROWTH)  # twice is no use, and growth upon growth


def check_growth(data: Any) -> None:
    """Raises TokenizerError for a tokenizer.json whose steps could make a text longer without bounds."""
    if not isinstance(data, dict):
        raise _refused(f"it holds a JSON {type(data).__name__}, expected an object")
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        steps = list(_steps(data.get(part)))
        if len(steps) > MAX_STEPS:
            raise _refused(f"its {part} has {len(steps)} steps, expected at most {MAX_STEPS}")
        growth, seen = 1.0, set()
        for step in steps:
            kind = str(step.get("type"))
            if kind in _ONCE:
                if kind in seen and part != "decoder":
                    raise _refused(f"its {part} has the step {kind} twice")
                seen.add(kind)
            elif kind == "Replace":
                growth *= _replacement(step, part)
        if growth > MAX_GROWTH:
            raise _refused(
                f"its {part} can make a text {growth:.0f} times as long, expected at most {MAX_GROWTH:.0f}"
            )
        if part == "post_processor":
            for step in steps:
                _check_template(step)


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    """The steps in order, those of sequences in their place; what is none is left to the library."""
    waiting = [step]
    while waiting:
        at = waiting.pop()
        if not isinstance(at, dict):
            continue
        inner = next((at[name] for name in _LISTS if isinstance(at.get(name), list)), None)
        if inner is None:
            yield at
        else:
            yield {"type": "Sequence"}
            waiting += reversed(inner)


def _replacement(step: dict[str, Any], part: str) -> float:
    pattern, content = step.get("pattern"), step.get("content")
    text = pattern.get("String") if isinstance(pattern, dict) else pattern
    if text == "" or not isinstance(content, str):
        raise _refused(f"its {part} replaces nothing by {content!r:.40}")
    shortest = len(text) if isinstance(text, str) else 1  # a regex may match one character
    return max(1.0, len(content) / shortest)


def _check_template(step: dict[str, Any]) -> None:
    """A template of the post-processor holds the text once; special tokens around it are counted too."""
    pieces = step.get("single")
    if not isinstance(pieces, list):
        return
    texts = sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces)
    if texts > 1 or len(pieces) > MAX_STEPS:
        raise _refused(f"its post_processor puts {texts} texts and {len(pieces) - texts} tokens for one text")


def _refused(what: str) -> TokenizerError:
    return TokenizerError(
        f"tokenizer.json cannot be used: {what}",
        remedy="Take tokenizer.json again from the model's original repository.",
    )
