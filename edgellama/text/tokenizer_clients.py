"""Forms of tokenizer.json that the bundle's clients read: ExecuTorch's text runner and onnxruntime-genai.

Their C++ tokenizers know a part of the `tokenizers` library. `readable` rewrites what has an exact equivalent in
that part, and proves it on texts. `client_notes` names the rest, as found by tests/text/test_tokenizer_clients.py
with ExecuTorch 1.4 and onnxruntime-genai 0.18.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from edgellama.text.probes import PROBES

EXECUTORCH, GENAI = "ExecuTorch's text runner", "onnxruntime-genai"

# Steps that ExecuTorch's tokenizer runs exactly. It refuses other pre-tokenizers; its NFC drops accents.
_NORMALIZERS = {"Sequence", "Prepend", "Replace"}
_PRE_TOKENIZERS = {"Sequence", "Split", "Digits", "ByteLevel"}
# Mark of a text's start in the rewritten form: a code point that Unicode keeps out of texts. ExecuTorch takes every
# place behind a match for a start, so that a regex with \A would not do.
START = "\ufdd0"

_DIGITS = re.compile(r"\d\d")


def readable(data: bytes) -> bytes:
    """tokenizer.json with Metaspace and partial splits in forms that the clients read.

    Returns `data` itself if nothing is to be rewritten, or if no rewriting is exact.
    """
    content = json.loads(data)
    changed = dict(content)
    if content["model"].get("type", "BPE") != "BPE":
        return data
    if not (_rewrite_metaspace(changed) | _rewrite_splits(changed)):
        return data
    text = json.dumps(changed, ensure_ascii=False) + "\n"
    return text.encode() if _equal(data.decode(), text) else data


def _rewrite_metaspace(content: dict[str, Any]) -> bool:
    """Metaspace as a normalizer. True if it was rewritten.

    Not for prepend_scheme `first`: no normalizer knows the first piece of a text from the pieces behind special
    tokens.
    """
    step = content.get("pre_tokenizer")
    if isinstance(step, Mapping) and step.get("type") == "Sequence" and len(step["pretokenizers"]) == 1:
        step = step["pretokenizers"][0]
    if not isinstance(step, Mapping) or step.get("type") != "Metaspace" or content.get("normalizer"):
        return False
    space, scheme = step.get("replacement", "▁"), step.get("prepend_scheme", "always")
    if scheme not in ("always", "never"):
        return False
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": space}
    steps = [spaces]
    if scheme == "always":  # one space, unless the text begins with one
        start = {"type": "Replace", "pattern": {"String": START + space}, "content": space}
        other_start = {"type": "Replace", "pattern": {"String": START}, "content": space}
        steps = [{"type": "Prepend", "prepend": START}, spaces, start, other_start]
    content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    content["pre_tokenizer"] = (
        {
            "type": "Split",
            "pattern": {"Regex": f"{re.escape(space)}[^{space}]*|[^{space}]+"},
            "behavior": "Isolated",
            "invert": False,
        }
        if step.get("split", True)
        else None
    )
    decoder = content.get("decoder")
    if isinstance(decoder, Mapping) and decoder.get("type") == "Metaspace":
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if scheme == "always" else []
        content["decoder"] = {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": space}, "content": " "},
                {"type": "Fuse"},
                *strip,
            ],
        }
    return True


def _rewrite_splits(content: dict[str, Any]) -> bool:
    """Split regexes that match every character. True if one was rewritten.

    ExecuTorch keeps only the matches of a regex, and `tokenizers` also what lies between them.
    """
    step, changed = content.get("pre_tokenizer"), False
    if not isinstance(step, Mapping):
        return False
    steps = []
    for inner in _steps(step):
        regex = inner.get("pattern", {}).get("Regex") if inner.get("type") == "Split" else None
        if regex is not None and inner.get("behavior") == "Isolated" and not _matches_all(regex):
            inner = dict(inner, pattern={"Regex": rf"{regex}|(?:(?!{regex})[\s\S])+"})
            changed = True
        steps.append(inner)
    if changed:
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return changed


def _matches_all(regex: str) -> bool:
    """True if the regex leaves nothing of the probes between its matches."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), behavior="removed")
    return not any(split.pre_tokenize_str(text) for text in PROBES if text)


def _equal(before: str, after: str) -> bool:
    """True if two tokenizers give the same ids, and decode them alike, for texts with and without added tokens."""
    one, other = tokenizers.Tokenizer.from_str(before), tokenizers.Tokenizer.from_str(after)
    added = [token.content for token in one.get_added_tokens_decoder().values()][:4]
    for text in _texts(added):
        ids = one.encode(text).ids
        if ids != other.encode(text).ids or one.decode(ids) != other.decode(ids):
            return False
    return True


def _texts(added: list[str]) -> Iterator[str]:
    yield from PROBES
    for token in added:
        for text in PROBES:
            yield f"{token}{text}{token} {text}"


def client_notes(data: bytes) -> tuple[str, ...]:
    """Sentences about clients that cannot load this tokenizer.json, or split text otherwise."""
    content = json.loads(data)
    notes = []
    for client, reason in _problems(content):
        notes.append(f"tokenizer: {client} {reason}; give it token ids from another tokenizer library")
    return tuple(notes)


def _problems(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model = content["model"].get("type", "BPE")
    normalizers = [step["type"] for step in _steps(content.get("normalizer"))]
    steps = list(_steps(content.get("pre_tokenizer")))
    kinds = [step["type"] for step in steps]
    metaspace = next((step for step in steps if step["type"] == "Metaspace"), None)
    if model != "BPE":
        yield f"{EXECUTORCH} and {GENAI}", f"cannot load a {model} model"
        return
    if metaspace is not None:
        scheme = metaspace.get("prepend_scheme", "always")
        yield EXECUTORCH, f"cannot load the pre-tokenizer Metaspace (prepend_scheme {scheme!r})"
        yield GENAI, "puts a space before every text behind a special token, and this tokenizer does not"
    elif any(kind not in _PRE_TOKENIZERS for kind in kinds):
        other = next(kind for kind in kinds if kind not in _PRE_TOKENIZERS)
        yield EXECUTORCH, f"cannot load the pre-tokenizer {other}"
    other = next((kind for kind in normalizers if kind not in _NORMALIZERS), None)
    if other is not None:
        yield EXECUTORCH, f"has no exact normalizer {other}: accented letters get other ids"
    if metaspace is None and "Replace" in normalizers and not _prepends_only(content.get("normalizer")):
        yield GENAI, "puts a space before every text behind a special token, and this tokenizer does not"
    if "Digits" in kinds and any(_DIGITS.search(token) for token in content["model"]["vocab"]):
        yield GENAI, "does not split numbers into digits, and this vocabulary has numbers of several digits"
    if any(r"\p{P}" in str(step.get("pattern")) for step in steps):
        yield GENAI, r"cannot load a pre-tokenizer with \p{P}"


def _prepends_only(normalizer: Any) -> bool:
    """True for a space before the text and ▁ for spaces, as SentencePiece does and the clients too."""
    return sorted(step["type"] for step in _steps(normalizer)) == ["Prepend", "Replace"]


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part of tokenizer.json, with sequences flattened."""
    if isinstance(step, Mapping):
        inner = step.get("pretokenizers", step.get("normalizers"))
        if isinstance(inner, list):
            for part in inner:
                yield from _steps(part)
        else:
            yield dict(step)
