"""Added tokens that stand outside tokenizer.json: tokenizer_config.json, special_tokens_map.json, added_tokens.json.

transformers adds them when it loads a tokenizer, in the order of their ids. Other readers of tokenizer.json,
and the phone, do not know them. So they are written into tokenizer.json, under the ids that transformers gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgellama.errors import TokenizerError
from edgellama.files import is_unicode

# Named special tokens of transformers (`SPECIAL_TOKENS_ATTRIBUTES`).
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
_REMEDY = "Take tokenizer.json and the files beside it again from one and the same model."


@dataclass(frozen=True)
class _Declared:
    """Token that a file beside tokenizer.json declares; `id` is None if the file states none."""

    content: str
    id: int | None
    flags: Mapping[str, bool]
    file: str


def text_of(value: Any) -> str | None:
    """Text of a special token, which is a string, an object with `content`, or absent."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def special_tokens(*places: Mapping[str, Any]) -> dict[str, str]:
    """Text of every special token by its name, from the first of `places` that has it.

    The names are those of transformers, and those that a model's own files add (`image_token`, ...).
    """
    texts: dict[str, str] = {}
    for place in places:
        extra = place.get("extra_special_tokens")
        for name, value in {**place, **(extra if isinstance(extra, Mapping) else {})}.items():
            text = text_of(value)
            if name.endswith("_token") and text is not None:
                texts.setdefault(name, text)
    return texts


def complete(
    data: bytes,
    config: Mapping[str, Any],
    special: Mapping[str, Any],
    added: Mapping[str, Any],
    normalized: bool | None = None,
) -> tuple[bytes, tuple[str, ...]]:
    """tokenizer.json with the added tokens of the files beside it, and a note for what was added.

    The bytes are those of `data` if nothing is missing.

    Args:
        data: tokenizer.json.
        config, special, added: content of tokenizer_config.json, special_tokens_map.json and
            added_tokens.json; empty for a file that is absent.
        normalized: flag of every new token; None as the files say. A normalizer that puts a space before a text
            would put it before such a token too, which is then not found.

    Raises TokenizerError for two tokens of one id, or an id that tokenizer.json cannot give.
    """
    tokenizer = json.loads(data)
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("model"), dict):
        return data, ()  # the loader names the damage
    entries = [entry for entry in tokenizer.get("added_tokens") or () if isinstance(entry, Mapping)]
    vocab = tokenizer["model"].get("vocab")
    ids: dict[str, int] = dict(vocab) if isinstance(vocab, dict) else {}
    if isinstance(vocab, list):
        ids = {piece[0]: i for i, piece in enumerate(vocab)}
    present = {entry.get("content") for entry in entries}
    ids |= {entry["content"]: entry["id"] for entry in entries if {"id", "content"} <= entry.keys()}
    texts = {i: text for text, i in ids.items()}
    size = max(ids.values(), default=-1) + 1
    new: list[dict[str, Any]] = []
    notes: list[str] = []
    for token in _declared(config, special, added):
        if token.content in present:
            continue
        if token.id is not None and texts.get(token.id, token.content) != token.content:
            raise TokenizerError(
                f"{token.file} gives id {token.id} to {token.content!r}, and tokenizer.json gives it to "
                f"{texts[token.id]!r}",
                remedy=_REMEDY,
            )
        actual = ids.get(token.content, size)
        if token.id is not None and token.id != actual:
            raise TokenizerError(
                f"{token.file} gives id {token.id} to {token.content!r}, and in tokenizer.json it "
                f"{'has' if token.content in ids else 'would get'} id {actual}",
                remedy=_REMEDY,
            )
        size = max(size, actual + 1)
        ids[token.content], texts[actual] = actual, token.content
        present.add(token.content)
        flags = dict(token.flags) if normalized is None else {**token.flags, "normalized": normalized}
        new.append({"id": actual, "content": token.content, **flags})
    if not new:
        return data, ()
    listing = ", ".join(f"{entry['content']} ({entry['id']})" for entry in new[:4])
    notes.append(
        f"added tokens that tokenizer.json lacks, as in transformers: {listing}"
        + (f" and {len(new) - 4} more" if len(new) > 4 else "")
    )
    tokenizer["added_tokens"] = sorted([*entries, *new], key=lambda entry: entry["id"])
    return (json.dumps(tokenizer, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"), tuple(notes)


def _declared(
    config: Mapping[str, Any], special: Mapping[str, Any], added: Mapping[str, Any]
) -> Iterator[_Declared]:
    """Tokens in the order in which transformers adds them: those with an id by id, then special ones.

    transformers reads the two older files only if tokenizer_config.json has no `added_tokens_decoder`. A pad
    token without an id is left out: nothing pads here.
    """
    decoder = config.get("added_tokens_decoder")
    older: Mapping[str, Any] = {} if isinstance(decoder, Mapping) else special
    named = special_tokens(older, config)
    extra = _listed(older) + _listed(config)
    tokens: list[_Declared] = []
    if isinstance(decoder, Mapping):
        for number, entry in decoder.items():
            content = text_of(entry)
            if content is None or not str(number).isdigit():
                raise TokenizerError(
                    f"tokenizer_config.json: added_tokens_decoder holds {number!r:.40}: {entry!r:.60}, "
                    "expected an id and a token",
                    remedy=_REMEDY,
                )
            flags = dict(_FLAGS, normalized=True, special=False)
            if isinstance(entry, Mapping):
                flags |= {name: entry[name] for name in _FLAGS if isinstance(entry.get(name), bool)}
            tokens.append(_Declared(content, int(number), flags, "tokenizer_config.json"))
    else:
        for content, number in added.items():
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise TokenizerError(
                    f"added_tokens.json: {content!r} has id {number!r:.40}, expected a number", remedy=_REMEDY
                )
            is_special = content in named.values() or content in extra
            flags = dict(_FLAGS, normalized=not is_special, special=is_special)
            tokens.append(_Declared(content, number, flags, "added_tokens.json"))
    yield from sorted(tokens, key=lambda token: -1 if token.id is None else token.id)
    for name in named:
        if name in NAMED and name != "pad_token" and is_unicode(named[name]):
            yield _Declared(named[name], None, _FLAGS, "tokenizer_config.json")
    for content in extra:
        yield _Declared(content, None, _FLAGS, "tokenizer_config.json")


def _listed(place: Mapping[str, Any]) -> list[str]:
    """Texts of `extra_special_tokens`, or of `additional_special_tokens`, its older name."""
    tokens = place.get("extra_special_tokens") or place.get("additional_special_tokens") or ()
    return [text for text in map(text_of, tokens) if text is not None] if isinstance(tokens, list) else []


def without(data: bytes, config: bytes, special: bytes | None, dropped: set[str]) -> dict[str, bytes]:
    """The tokenizer's files without these added tokens, by file name."""
    tokenizer, settings = json.loads(data), json.loads(config)
    tokenizer["added_tokens"] = [e for e in tokenizer["added_tokens"] if e["content"] not in dropped]
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        settings["added_tokens_decoder"] = {i: e for i, e in decoder.items() if text_of(e) not in dropped}
    places = {"tokenizer_config.json": settings}
    if special is not None:
        places["special_tokens_map.json"] = json.loads(special)
    for place in places.values():
        for name in [name for name, value in place.items() if text_of(value) in dropped]:
            del place[name]
        for name in ("extra_special_tokens", "additional_special_tokens"):
            if isinstance(place.get(name), list):
                place[name] = [value for value in place[name] if text_of(value) not in dropped]
    files = {"tokenizer.json": tokenizer, **places}
    return {
        name: (json.dumps(content, ensure_ascii=False) + "\n").encode() for name, content in files.items()
    }
