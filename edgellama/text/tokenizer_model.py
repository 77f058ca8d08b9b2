"""Meta's tokenizer.model as tokenizer.json: tiktoken text (Llama 3) or a SentencePiece model (Llama 2).

The rebuilt tokenizer is proven before it is used. It must give the original's ids for the probes below and
for texts made of its own tokens. Otherwise the file is refused.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from json import dumps, loads
from pathlib import Path
from typing import Any

import tokenizers

from edgellama.errors import TokenizerError
from edgellama.text.probes import PROBES
from edgellama.text.token_stream import byte_characters
from edgellama.text.tokenizer_json import (
    BYTE,
    CONTROL,
    LLAMA3_SPLIT,
    NORMAL,
    UNKNOWN,
    UNUSED,
    AddedToken,
    byte_level_bpe_json,
    merges_of_scores,
    sentencepiece_json,
)

# Llama 3's special tokens, which follow the ranks (Llama 3.1 model card, "prompt format"): place -> name.
# The other places are <|reserved_special_token_N|>, numbered in order.
LLAMA3_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
LLAMA3_SPECIAL_COUNT = 256

_REMEDY = (
    "Take tokenizer.model again from the model's original download, or put its tokenizer.json beside it."
)


@dataclass(frozen=True)
class Rebuilt:
    """tokenizer.json made from a tokenizer.model, and the texts of its bos and eos tokens."""

    json: bytes
    bos_token: str | None
    eos_token: str | None


@dataclass(frozen=True)
class Flags:
    """Additions of an encoding to the text, which tokenizer.model does not state. The defaults are those of Meta's code.

    Attributes:
        add_bos, add_eos: encoding adds these tokens.
        space: place of the space before the text, by the names of Metaspace: `first`, `always` (also behind a
            special token) or `never`. None for SentencePiece's own way.
    """

    add_bos: bool = True
    add_eos: bool = False
    space: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Flags:
        """Flags in a tokenizer_config.json, as transformers 5 understands it (`LlamaTokenizer`)."""
        space = None
        if config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast"):
            space = "always" if config.get("legacy") is True else "first"
            space = "never" if config.get("add_prefix_space") is False else space
        return cls(config.get("add_bos_token") is True, config.get("add_eos_token") is True, space)


def rebuild(path: Path, flags: Flags = Flags()) -> Rebuilt:
    """Builds the tokenizer.json that splits text exactly as the tokenizer.model at `path` does.

    flags: what it adds to the text, which the file does not say.
    Raises TokenizerError if the file has neither form, is damaged, or cannot be rebuilt exactly.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"{path}: {error.strerror}", remedy="Check that the file can be read."
        ) from error
    ranks = _tiktoken_ranks(data, path)
    return _from_sentencepiece(data, path, flags) if ranks is None else _from_ranks(ranks, path, flags)


def _tiktoken_ranks(data: bytes, path: Path) -> dict[bytes, int] | None:
    """Token bytes -> rank, from lines of `base64 rank`; None if the file does not begin with such a line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            if number == 1:
                return None
            raise TokenizerError(
                f"{path}: line {number} is not `base64 rank`: {line[:40]!r}", remedy=_REMEDY
            ) from error
    if not ranks:
        return None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{path}: the ranks are not 0 to {len(ranks) - 1}, each once", remedy=_REMEDY)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"{path}: no token for byte {missing[0]:#04x}", remedy=_REMEDY)
    return ranks


def _from_ranks(ranks: Mapping[bytes, int], path: Path, flags: Flags) -> Rebuilt:
    characters = byte_characters()
    vocab = {"".join(characters[byte] for byte in token): rank for token, rank in ranks.items()}
    in_order = sorted(vocab, key=vocab.__getitem__)
    special = [AddedToken(len(ranks) + place, name) for place, name in enumerate(llama3_special_names())]
    bos, eos = special[0].content, special[1].content
    json = byte_level_bpe_json(
        vocab,
        merges_of_scores({token: -vocab[token] for token in in_order}),
        pre_tokenizer="llama-bpe",
        added_tokens=special,
        add_bos=bos if flags.add_bos else None,
        add_eos=eos if flags.add_eos else None,
        ignore_merges=True,
    )
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated")

    def original(text: str) -> list[int]:
        words = (word.encode() for word, _ in split.pre_tokenize_str(text))
        return [rank for word in words for rank in _merge_by_rank(word, ranks)]

    words = [word.strip() for word in map(_decoded, ranks) if word is not None]
    # With `ignore_merges` a single token is found whole. Only two tokens in one word test the merges.
    _prove(json, [*PROBES, *(a + b for a, b in list(pairwise(words))[::8])], original, path)
    return Rebuilt(json, bos, eos)


def _merge_by_rank(word: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Token ranks of one word by tiktoken's rule: neighbours whose joined bytes rank lowest merge first."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def llama3_special_names() -> list[str]:
    """The 256 special tokens of Llama 3.1 and later, in the order of their ids."""
    names: list[str] = []
    for place in range(LLAMA3_SPECIAL_COUNT):
        reserved = sum(name.startswith("<|reserved") for name in names)
        names.append(LLAMA3_SPECIAL.get(place, f"<|reserved_special_token_{reserved}|>"))
    return names


def _from_sentencepiece(data: bytes, path: Path, flags: Flags) -> Rebuilt:
    import sentencepiece  # no other checkpoint needs it

    try:
        if not data:
            raise RuntimeError("the file is empty")
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TokenizerError(
            f"{path}: neither tiktoken's text nor a SentencePiece model ({reason})", remedy=_REMEDY
        ) from error
    count = model.get_piece_size()
    kinds = (
        (model.is_unknown, UNKNOWN),
        (model.is_control, CONTROL),
        (model.is_byte, BYTE),
        (model.is_unused, UNUSED),
    )
    pieces = [
        (
            model.id_to_piece(i),
            model.get_score(i),
            next((kind for is_kind, kind in kinds if is_kind(i)), NORMAL),
        )
        for i in range(count)
    ]
    bos, eos = model.bos_id(), model.eos_id()
    json = sentencepiece_json(
        pieces,
        add_space_prefix=model.encode("a", out_type=str)[:1] != ["a"],
        bos_id=None if bos < 0 else bos,
        eos_id=None if eos < 0 else eos,
        unk_id=model.unk_id(),
        add_bos=bos >= 0 and flags.add_bos,
        add_eos=eos >= 0 and flags.add_eos,
    )
    texts = [*PROBES, *(text.replace("▁", " ") for text, _, kind in pieces if kind == NORMAL)]
    _prove(json, texts, model.encode, path)
    if flags.space is not None:
        json = _with_metaspace(json, flags.space)
    return Rebuilt(json, None if bos < 0 else pieces[bos][0], None if eos < 0 else pieces[eos][0])


def _with_metaspace(data: bytes, scheme: str) -> bytes:
    """The same tokenizer.json with its spaces put by Metaspace, as transformers has it."""
    content = loads(data)
    content["normalizer"] = None
    content["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": scheme,
        "split": False,
    }
    steps = [step for step in content["decoder"]["decoders"] if step["type"] != "Strip"]
    strip = [] if scheme == "never" else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    content["decoder"]["decoders"] = [*steps, *strip]
    return (dumps(content, ensure_ascii=False) + "\n").encode()


def _decoded(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None


def _prove(json: bytes, texts: Iterable[str], original: Callable[[str], list[int]], path: Path) -> None:
    """Raises TokenizerError at the first text that the rebuilt tokenizer splits differently."""
    rebuilt = tokenizers.Tokenizer.from_str(json.decode())
    for text in texts:
        actual, expected = rebuilt.encode(text, add_special_tokens=False).ids, list(original(text))
        if actual != expected:
            raise TokenizerError(
                f"{path}: a tokenizer.json rebuilt from this file would split {text[:40]!r} into "
                f"{actual[:8]}, and the original gives {expected[:8]}",
                remedy="Put the model's own tokenizer.json beside it; edgellama does not ship a tokenizer that is "
                "almost right.",
            )
