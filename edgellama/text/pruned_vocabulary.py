"""Tokenizer with the tokens of a corpus alone, for a classifier of texts of one kind.

Byte-level BPE applies the merge of the lowest rank, again and again. Every token that occurs on this way for a word of
the corpus is kept, so the same merges are chosen and the word gets the same pieces. The tokens of single bytes are kept
too, so any other text still has pieces. They are smaller ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from edgellama.errors import TokenizerError, UsageError
from edgellama.text.tokenizer import Tokenizer

_IDS_OF_FILES = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Pruned:
    """A tokenizer with fewer tokens.

    Attributes:
        tokenizer: with new ids.
        kept: old id of each new one. Tokens that the corpus has come first.
        seen: number of these.
    """

    tokenizer: Tokenizer
    kept: tuple[int, ...]
    seen: int

    @property
    def new_ids(self) -> dict[int, int]:
        """New ids by old ones."""
        return {old: new for new, old in enumerate(self.kept)}


def pruned(tokenizer: Tokenizer, texts: Iterable[str], needed: Iterable[int]) -> Pruned:
    """The tokenizer with the tokens of `texts` and the ids `needed`, proven to give these texts the same pieces.

    Raises UsageError for a tokenizer that is not byte-level BPE.
    """
    data = _byte_level(tokenizer)
    texts = list(dict.fromkeys(texts))
    library = tokenizers.Tokenizer.from_str(tokenizer.files["tokenizer.json"].decode())
    added = {token["id"] for token in data.get("added_tokens") or ()}
    vocabulary: Mapping[str, int] = data["model"]["vocab"]
    seen, words = {*added, *needed}, set[tuple[str, ...]]()
    for text in texts:
        encoding = library.encode(text)
        seen.update(encoding.ids)
        words.update(_words(encoding, added))
    ranks = {pair: rank for rank, pair in enumerate(_merges(data))}
    whole = bool(data["model"].get("ignore_merges"))
    steps = {step for word in words for step in _steps(word, ranks, whole=whole)}
    others = {vocabulary[piece] for piece in (*steps, *ByteLevel.alphabet()) if piece in vocabulary} - seen
    found = rewritten(tokenizer, (*sorted(seen), *sorted(others)), len(seen))
    new_ids = found.new_ids
    for text in texts:
        if [new_ids[token] for token in tokenizer.encode(text)] != found.tokenizer.encode(text):
            raise TokenizerError(
                f"the pruned tokenizer gives the text {text[:40]!r} of the corpus other pieces",
                remedy="Leave out --prune-vocabulary; this tokenizer was not foreseen.",
            )
    return found


def rewritten(tokenizer: Tokenizer, kept: Sequence[int], seen: int) -> Pruned:
    """The tokenizer with the old ids `kept` alone, in their order. Merges stay whose tokens all stay."""
    data = _byte_level(tokenizer)
    new_ids = {old: new for new, old in enumerate(kept)}
    model = data["model"]
    vocabulary = {piece: new_ids[old] for piece, old in model["vocab"].items() if old in new_ids}
    merges = [pair for pair in _merges(data) if all(x in vocabulary for x in (*pair, "".join(pair)))]
    model["vocab"] = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    model["merges"] = [list(pair) for pair in merges]
    data["added_tokens"] = sorted(
        (
            {**token, "id": new_ids[token["id"]]}
            for token in data.get("added_tokens") or ()
            if token["id"] in new_ids
        ),
        key=lambda token: int(token["id"]),
    )
    _renumber(data.get("post_processor"), new_ids)
    files = {name: content for name, content in tokenizer.files.items() if name != "chat_template.jinja"}
    files["tokenizer.json"] = (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode()
    for name in ("tokenizer_config.json", "generation_config.json"):
        if name in files:
            files[name] = _with_new_ids(files[name], new_ids)
    fresh = Tokenizer(
        files,
        chat_template=tokenizer.chat_template,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        special_tokens=tokenizer.special_tokens,
        notes=tokenizer.notes,
    )
    return Pruned(fresh, tuple(kept), seen)


def kept_ids(small: Tokenizer, whole: Tokenizer, rows: int) -> tuple[int, ...]:
    """Old id of each new one, by the texts of the tokens. Raises TokenizerError for a token that `whole` does not have."""
    library = tokenizers.Tokenizer.from_str(small.files["tokenizer.json"].decode())
    ids = [
        whole.token_id(piece) if (piece := library.id_to_token(row)) is not None else None
        for row in range(rows)
    ]
    if None in ids or len({*ids}) < rows:
        raise TokenizerError(
            "the bundle's pruned tokenizer has tokens that the checkpoint's does not have, or one twice",
            remedy="Give the checkpoint that the bundle was made from.",
        )
    return tuple(token for token in ids if token is not None)


def seen_of(kept: Sequence[int]) -> int:
    """Number of the tokens that the corpus has. Both they and the others are sorted, so the order falls once.

    >>> seen_of((2, 7, 9, 1, 4)), seen_of((2, 7, 9))
    (3, 3)
    """
    return next((new for new in range(1, len(kept)) if kept[new] < kept[new - 1]), len(kept))


def _byte_level(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE without an unknown token. Raises UsageError for another kind."""
    data: dict[str, Any] = json.loads(tokenizer.files["tokenizer.json"])
    model = data["model"]
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps(data.get("pre_tokenizer")):
        raise UsageError(
            f"the tokenizer is {model.get('type')} and not byte-level BPE, so its vocabulary cannot be pruned",
            remedy="Leave out --prune-vocabulary.",
        )
    missing = [piece for piece in ByteLevel.alphabet() if piece not in model["vocab"]]
    if missing:
        raise UsageError(
            f"the tokenizer has no token for {len(missing)} of 256 bytes, so not every text would have pieces",
            remedy="Leave out --prune-vocabulary.",
        )
    return data


def _merges(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in data["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _words(encoding: tokenizers.Encoding, added: set[int]) -> Iterator[tuple[str, ...]]:
    """Pieces of each word of an encoding, without added tokens."""
    words: dict[int, list[str]] = {}
    for piece, token, word in zip(encoding.tokens, encoding.ids, encoding.word_ids, strict=True):
        if word is not None and token not in added:
            words.setdefault(word, []).append(piece)
    return map(tuple, words.values())


def _steps(word: Sequence[str], ranks: Mapping[tuple[str, str], int], *, whole: bool) -> set[str]:
    """Tokens that occur while the characters of a word are merged to its pieces.

    whole: a word that is a token itself is not merged at all.
    """
    if whole and len(word) == 1:
        return {word[0]}
    symbols, found = list("".join(word)), set[str]()
    found.update(symbols)
    while len(symbols) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), n) for n, pair in enumerate(pairwise(symbols)))
        if rank == len(ranks):
            break
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        found.add(symbols[at])
    return found


def _renumber(section: Any, new_ids: Mapping[int, int]) -> None:
    """Replaces the ids in a post-processor, in place: `ids` of templates and the second of a pair of text and id."""
    if isinstance(section, list):
        for part in section:
            _renumber(part, new_ids)
    if not isinstance(section, dict):
        return
    for key, value in section.items():
        if key == "ids" and isinstance(value, list):
            section[key] = [new_ids[token] for token in value]
        elif key in ("sep", "cls") and isinstance(value, list) and len(value) == 2:
            section[key] = [value[0], new_ids[value[1]]]
        else:
            _renumber(value, new_ids)


def _with_new_ids(content: bytes, new_ids: Mapping[int, int]) -> bytes:
    """A config file with the new ids of its special tokens. Ids without a token are left out."""
    data = json.loads(content)
    for key in _IDS_OF_FILES:
        value = data.get(key)
        if isinstance(value, list):
            data[key] = [new_ids[token] for token in value if token in new_ids]
        elif isinstance(value, int):
            data[key] = new_ids.get(value)
    decoder = data.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        data["added_tokens_decoder"] = {
            str(new_ids[int(old)]): token for old, token in decoder.items() if int(old) in new_ids
        }
    return (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode()
