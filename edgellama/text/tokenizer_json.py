"""Builders of tokenizer.json from other forms: GGUF metadata, SentencePiece, tiktoken.

Both builders return the file's bytes after the `tokenizers` library has loaded them and given every token its
expected id. The caller must prove that the result splits text as the original does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from edgellama.errors import TokenizerError

# Kinds of a SentencePiece piece (sentencepiece_model.proto), which GGUF's token_type uses too.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _splits(*steps: str | dict[str, Any]) -> dict[str, Any]:
    """Pre-tokenizers in sequence, then bytes: each text is a regex whose matches stand alone."""
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    regexes = [step if isinstance(step, dict) else {**split, "pattern": {"Regex": step}} for step in steps]
    return {"type": "Sequence", "pretokenizers": [*regexes, _byte_level(use_regex=False)]}


_DIGITS = {"type": "Digits", "individual_digits": True}

# tokenizer.json of deepseek-llm-7b-base and deepseek-coder-6.7b-instruct. The class of letters lists the cased ones.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-"
    "\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-"
    "\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-"
    "\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc"
    "\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-"
    "\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-"
    "\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-"
    "\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-"
    "\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-"
    "\U000118df\U0001e900-\U0001e943"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_PUNCTUATION = r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"

# tokenizer.json of Mistral-Nemo, whose words end where lower case meets upper case.
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Splits of text into words before merging, by the names of GGUF's `tokenizer.ggml.pre`.
PRE_TOKENIZERS: Mapping[str, dict[str, Any]] = {
    "gpt-2": _byte_level(use_regex=True),
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
    },
    "llama-bpe": _splits(LLAMA3_SPLIT),
    "deepseek-llm": _splits(r"[\r\n]", rf"\s?[{_CASED}]+", _PUNCTUATION, r"\s+$", _CJK, _DIGITS),
    "deepseek-coder": _splits(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGITS),
    "tekken": _splits(TEKKEN_SPLIT),
}


@dataclass(frozen=True)
class AddedToken:
    """Token that is found in the text before any split. Decoding hides a special one."""

    id: int
    content: str
    special: bool = True

    def to_json(self) -> dict[str, Any]:
        """Entry of tokenizer.json's `added_tokens`."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return {"id": self.id, "content": self.content, **flags, "special": self.special}


def byte_level_bpe_json(
    vocab: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    *,
    pre_tokenizer: str,
    added_tokens: Sequence[AddedToken] = (),
    add_bos: str | None = None,
    add_eos: str | None = None,
    ignore_merges: bool = False,
) -> bytes:
    """tokenizer.json of a byte-level BPE, as in GPT-2, SmolLM and Llama 3.

    Args:
        vocab: token -> id, with bytes written in GPT-2's printable characters.
        merges: pairs in order of priority.
        pre_tokenizer: a name in PRE_TOKENIZERS.
        added_tokens: tokens that are found before any split.
        add_bos, add_eos: text of the token that encoding puts before and after; None for no token.
        ignore_merges: a word in the vocabulary is one token, regardless of the merges (Llama 3).

    Raises TokenizerError for an unknown pre-tokenizer or a vocabulary that `tokenizers` does not reproduce.
    """
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"pre-tokenizer {pre_tokenizer!r} is not known, expected one of {sorted(PRE_TOKENIZERS)}",
            remedy="A wrong pre-tokenizer splits numbers and spaces differently without an error; "
            "use the model's Hugging Face directory with its tokenizer.json instead.",
        )
    model = _bpe(vocab, merges) | {"ignore_merges": ignore_merges}
    return _checked_json(
        model,
        added_tokens,
        normalizer=None,
        pre_tokenizer=PRE_TOKENIZERS[pre_tokenizer],
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        add_bos=add_bos,
        add_eos=add_eos,
    )


def sentencepiece_json(
    pieces: Sequence[tuple[str, float, int]],
    *,
    add_space_prefix: bool,
    bos_id: int | None,
    eos_id: int | None,
    unk_id: int | None,
    add_bos: bool,
    add_eos: bool,
) -> bytes:
    """tokenizer.json of a SentencePiece BPE model, as in Llama 2.

    Args:
        pieces: (text, score, kind) by id, with the kinds above; a higher score merges earlier.
        add_space_prefix: SentencePiece's add_dummy_prefix, a space before the text that decoding drops.
        bos_id, eos_id, unk_id: ids of these tokens, None if the model has none.
        add_bos, add_eos: True if encoding adds these tokens.

    Raises TokenizerError for a repeated piece or a vocabulary that `tokenizers` does not reproduce.
    """
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    if len(vocab) != len(pieces):
        doubled = next(text for i, (text, _, _) in enumerate(pieces) if vocab[text] != i)
        raise TokenizerError(
            f"the vocabulary holds {doubled!r} more than once",
            remedy="Take the tokenizer from the model's original files.",
        )
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    byte_fallback = any(kind == BYTE for _, _, kind in pieces)
    model = _bpe(vocab, merges_of_scores(scores)) | {
        "unk_token": None if unk_id is None else _text_of(pieces, unk_id),
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
    }
    added = [
        AddedToken(i, text, special=kind != USER_DEFINED)
        for i, (text, _, kind) in enumerate(pieces)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    prepend = [{"type": "Prepend", "prepend": "▁"}] if add_space_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_space_prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return _checked_json(
        model,
        added,
        normalizer={"type": "Sequence", "normalizers": [*prepend, spaces]},
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        add_bos=None if not add_bos or bos_id is None else _text_of(pieces, bos_id),
        add_eos=None if not add_eos or eos_id is None else _text_of(pieces, eos_id),
    )


def merges_of_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Merges that scores imply: each way to make a token from two others, the highest score first.

    SentencePiece and tiktoken merge the neighbours whose joined text has the best score (tiktoken: the lowest
    rank). BPE merges the pair of the lowest rank. With every pair ranked by its product's score, the three
    agree if no two tokens have the same score.

    Args:
        scores: scores of the tokens that merging may produce or use, in the order of their ids.
    """
    ids = {token: i for i, token in enumerate(scores)}
    ranked = [
        (-score, ids[token], ids[token[:cut]], ids[token[cut:]])
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    tokens = list(scores)
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(ranked)]


def _bpe(vocab: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
        "merges": [list(pair) for pair in merges],
    }


def _checked_json(
    model: dict[str, Any],
    added_tokens: Sequence[AddedToken],
    *,
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    add_bos: str | None,
    add_eos: str | None,
) -> bytes:
    """Bytes of tokenizer.json. Raises TokenizerError if `tokenizers` cannot load it or changes an id."""
    ids = {**model["vocab"], **{token.content: token.id for token in added_tokens}}
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token.to_json() for token in sorted(added_tokens, key=lambda token: token.id)],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _post_processor(add_bos, add_eos, ids),
        "decoder": decoder,
        "model": model,
    }
    text = json.dumps(data, ensure_ascii=False) + "\n"
    remedy = "The vocabulary or its merges are damaged; take the tokenizer from the model's original files."
    try:
        built = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception for every kind of damage
        raise TokenizerError(
            f"no tokenizer can be built from this vocabulary: {error}", remedy=remedy
        ) from error
    actual_ids = built.get_vocab(with_added_tokens=True)
    if actual_ids != ids:
        token = next(t for t in {**ids, **actual_ids} if ids.get(t) != actual_ids.get(t))
        raise TokenizerError(
            f"token {token!r} has id {ids.get(token)} in the model and would get {actual_ids.get(token)}",
            remedy=remedy,
        )
    return text.encode()


def _post_processor(bos: str | None, eos: str | None, ids: Mapping[str, int]) -> dict[str, Any] | None:
    """Post-processor that puts bos and eos around the text, None if there is neither."""
    specials = [token for token in (bos, eos) if token is not None]
    if not specials:
        return None
    for token in specials:
        if token not in ids:
            raise TokenizerError(
                f"{token!r} is to be added to every text, and is not in the vocabulary",
                remedy="Take the tokenizer from the model's original files.",
            )

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        before = [{"SpecialToken": {"id": bos, "type_id": type_id}}] if bos is not None else []
        after = [{"SpecialToken": {"id": eos, "type_id": type_id}}] if eos is not None else []
        return [*before, {"Sequence": {"id": sequence, "type_id": type_id}}, *after]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in specials
        },
    }


def _text_of(pieces: Sequence[tuple[str, float, int]], token: int) -> str:
    if not 0 <= token < len(pieces):
        raise TokenizerError(
            f"a special token has id {token}, and the vocabulary has {len(pieces)} tokens",
            remedy="Take the tokenizer from the model's original files.",
        )
    return pieces[token][0]
