"""Limits on text growth in a tokenizer.json: an untrusted one could double a text in each of a hundred steps.

`tokenizers` runs all steps that the file lists and has no limit of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgellama.errors import TokenizerError

# Steps of each part: normalizer, pre-tokenizer, post-processor and decoder. Three are usual.
MAX_STEPS = 32
MAX_GROWTH = 32.0  # output characters per input character
_LISTS = ("normalizers", "pretokenizers", "processors", "decoders")
# Growth by one step: Unicode's longest decomposition, and each byte of UTF-8 as a letter.
_GROWTH = {"NFKC": 18.0, "NFKD": 18.0, "NFC": 3.0, "NFD": 4.0, "ByteLevel": 4.0, "Precompiled": 18.0}
_ONCE = frozenset(_GROWTH)  # a second one has no use and multiplies growth


def check_growth(data: Any) -> None:
    """Raises TokenizerError for a tokenizer.json whose steps could lengthen a text without bounds."""
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
    """Flattens sequences, each also a step itself. Malformed steps are left to the tokenizers library."""
    pending = [step]
    while pending:
        current = pending.pop()
        if not isinstance(current, dict):
            continue
        inner = next((current[name] for name in _LISTS if isinstance(current.get(name), list)), None)
        if inner is None:
            yield current
        else:
            yield {"type": "Sequence"}
            pending += reversed(inner)


def _replacement(step: dict[str, Any], part: str) -> float:
    pattern, content = step.get("pattern"), step.get("content")
    text = pattern.get("String") if isinstance(pattern, dict) else pattern
    if text == "" or not isinstance(content, str):
        raise _refused(f"its {part} replaces nothing by {content!r:.40}")
    shortest = len(text) if isinstance(text, str) else 1  # a regex may match one character
    return max(1.0, len(content) / shortest)


def _check_template(step: dict[str, Any]) -> None:
    """Raises TokenizerError if a post-processor's template repeats the text or has too many pieces."""
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
