"""Tokenizer of a GGUF file: rebuilds from metadata the tokenizer.json that the model had before conversion.

Absent keys take llama.cpp's defaults (src/llama-vocab.cpp, `llama_vocab::impl::load`). Nothing else is
assumed: unknown pre-tokenizers and switches are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgellama.errors import TokenizerError
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.tokenizer_json import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    AddedToken,
    byte_level_bpe_json,
    sentencepiece_json,
)


@dataclass(frozen=True)
class Splitting:
    """Meaning of a `tokenizer.ggml.pre` value. `add_bos`: used if tokenizer.ggml.add_bos_token is absent."""

    pre_tokenizer: str
    ignore_merges: bool = False
    add_bos: bool = False


# llama.cpp sets `ignore_merges` and `add_bos` for the names of Llama 3 and for tekken, and neither for the others.
_LLAMA3 = Splitting("llama-bpe", ignore_merges=True, add_bos=True)
SPLITTINGS: Mapping[str, Splitting] = {
    "gpt-2": Splitting("gpt-2"),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": Splitting("llama-bpe"),  # Llama 3 as converted before tokenizer.json had `ignore_merges`
    "smollm": Splitting("smollm"),
    "deepseek-llm": Splitting("deepseek-llm"),
    "deepseek-coder": Splitting("deepseek-coder"),
    "tekken": Splitting("tekken", ignore_merges=True, add_bos=True),
}

# Metadata keys under `tokenizer.` that are read below or do not affect the splitting of text.
KNOWN = frozenset(
    {
        "ggml.model",
        "ggml.pre",
        "ggml.tokens",
        "ggml.token_type",
        "ggml.scores",
        "ggml.merges",
        "ggml.add_bos_token",
        "ggml.add_eos_token",
        "ggml.add_space_prefix",
        "huggingface.json",
        "chat_template",
        "chat_templates",
    }
)
# Metadata keys that affect the splitting, with their neutral value. Any other key is refused.
NEUTRAL: Mapping[str, Any] = {
    "ggml.add_sep_token": False,
    "ggml.remove_extra_whitespaces": False,
    "ggml.treat_whitespace_as_suffix": False,
}

_REMEDY = (
    "Give the model's Hugging Face directory with its tokenizer.json, or a file made by a current llama.cpp."
)


def rebuild_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer from GGUF metadata: kind `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).

    Raises TokenizerError for other kinds, for unknown pre-tokenizers and switches, and for damaged lists.
    """
    _check_keys(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(
            f"tokenizer.ggml.model is {kind!r}, expected 'gpt2' (byte-level BPE) or 'llama' (SentencePiece)",
            remedy=_REMEDY,
        )
    tokens = _list(metadata, "tokens", str)
    types = _list(metadata, "token_type", int, length=len(tokens))
    build = _byte_level if kind == "gpt2" else _sentencepiece
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise TokenizerError("tokenizer.chat_template is not a text", remedy=_REMEDY)
    return Tokenizer(
        {"tokenizer.json": build(metadata, tokens, types)},
        chat_template=template,
        bos_token=_special(metadata, "bos"),
        eos_token=_special(metadata, "eos"),
    )


def special_id(metadata: Mapping[str, Any], role: str) -> int | None:
    """ID in `tokenizer.ggml.{role}_token_id`, or None if the key is absent.

    Expects metadata that rebuild_tokenizer has accepted. Raises TokenizerError for an ID without a token.
    """
    value = metadata.get(f"tokenizer.ggml.{role}_token_id")
    count = len(metadata["tokenizer.ggml.tokens"])
    if value is None or (type(value) is int and 0 <= value < count):
        return value
    raise TokenizerError(
        f"tokenizer.ggml.{role}_token_id is {value!r:.60}, and there are {count} tokens", remedy=_REMEDY
    )


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> bytes:
    """tokenizer.json for tokens that spell bytes in GPT-2's characters. Added tokens are plain text."""
    pre = metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in SPLITTINGS:
        # `default` or no name means that the converter did not recognize the pre-tokenizer.
        raise TokenizerError(
            f"tokenizer.ggml.pre is {pre!r}, expected one of {', '.join(SPLITTINGS)}: a wrong pre-tokenizer "
            "splits numbers and spaces differently without any error",
            remedy=_REMEDY,
        )
    if _flag(metadata, "add_space_prefix", False):
        raise TokenizerError(
            "tokenizer.ggml.add_space_prefix is true, expected false for a byte-level tokenizer",
            remedy=_REMEDY,
        )
    splitting = SPLITTINGS[pre]
    vocab: dict[str, int] = {}
    for i, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type == UNUSED and token == f"[PAD{i}]":
            continue  # the converter's padding for embedding rows without a token
        if token in vocab:
            raise TokenizerError(
                f"tokenizer.ggml.tokens holds {token!r} twice, as {vocab[token]} and {i}", remedy=_REMEDY
            )
        vocab[token] = i
    merges = []
    for merge in _list(metadata, "merges", str):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise TokenizerError(
                f"tokenizer.ggml.merges holds {merge!r}, expected two tokens and a space", remedy=_REMEDY
            )
        merges.append((left, right))
    added = [
        AddedToken(i, token, special=token_type != USER_DEFINED)
        for i, (token, token_type) in enumerate(zip(tokens, types, strict=True))
        if token_type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    add_bos, add_eos = _additions(metadata, add_bos=splitting.add_bos)
    return byte_level_bpe_json(
        vocab,
        merges,
        pre_tokenizer=splitting.pre_tokenizer,
        added_tokens=added,
        add_bos=add_bos,
        add_eos=add_eos,
        ignore_merges=splitting.ignore_merges,
    )


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> bytes:
    """tokenizer.json for SentencePiece pieces. Their scores give the order of the merges."""
    scores = _list(metadata, "scores", float, length=len(tokens))
    normal = {score for score, token_type in zip(scores, types, strict=True) if token_type == NORMAL}
    if len(normal) < 2:
        # Without a tokenizer.model, convert_hf_to_gguf.py writes the same score for all tokens.
        raise TokenizerError(
            f"tokenizer.ggml.scores is {normal or 'empty'} for every token, so the order of the merges is lost",
            remedy="Give the model's Hugging Face directory with its tokenizer.json.",
        )
    pieces = list(zip(tokens, scores, types, strict=True))
    while pieces and pieces[-1][2] == UNUSED and pieces[-1][0] == f"[PAD{len(pieces) - 1}]":
        pieces.pop()  # the converter's padding for embedding rows without a token
    for piece, _, piece_type in pieces:
        if piece_type == USER_DEFINED and "▁" in piece:
            raise TokenizerError(
                f"the user-defined token {piece!r} holds a SentencePiece space, "
                "which tokenizer.json cannot match in text",
                remedy=_REMEDY,
            )
    add_bos, add_eos = _additions(metadata, add_bos=True)
    return sentencepiece_json(
        pieces,
        add_space_prefix=_flag(metadata, "add_space_prefix", True),
        bos_id=special_id(metadata, "bos"),
        eos_id=special_id(metadata, "eos"),
        unk_id=special_id(metadata, "unknown"),
        add_bos=add_bos is not None,
        add_eos=add_eos is not None,
    )


def _additions(metadata: Mapping[str, Any], *, add_bos: bool) -> tuple[str | None, str | None]:
    """(BOS text, EOS text) that encoding adds; None for no token. `add_bos`: llama.cpp's default."""
    texts = []
    for role, default in (("bos", add_bos), ("eos", False)):
        text = _special(metadata, role)
        add = _flag(metadata, f"add_{role}_token", default and text is not None)
        if add and text is None:
            raise TokenizerError(
                f"a {role} token is added to every text, and tokenizer.ggml.{role}_token_id is not given",
                remedy=_REMEDY,
            )
        texts.append(text if add else None)
    return texts[0], texts[1]


def _check_keys(metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        name = key.removeprefix("tokenizer.")
        if name == key or name in KNOWN or name.endswith("_token_id") or name.startswith("chat_template."):
            continue
        if name not in NEUTRAL:
            raise TokenizerError(
                f"{key} is not a key that edgellama knows: it may change how text is split",
                remedy=_REMEDY,
            )
        if value != NEUTRAL[name]:
            raise TokenizerError(f"{key} is {value!r:.60}, expected {NEUTRAL[name]!r}", remedy=_REMEDY)


def _list(metadata: Mapping[str, Any], key: str, kind: type, *, length: int | None = None) -> list[Any]:
    entries = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(entries, list) or not entries or not all(type(item) is kind for item in entries):
        raise TokenizerError(f"tokenizer.ggml.{key} is not a list of {kind.__name__}", remedy=_REMEDY)
    if length is not None and len(entries) != length:
        raise TokenizerError(
            f"tokenizer.ggml.{key} has {len(entries)} entries, tokenizer.ggml.tokens {length}", remedy=_REMEDY
        )
    return entries


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        raise TokenizerError(f"tokenizer.ggml.{key} is {value!r:.60}, expected true or false", remedy=_REMEDY)
    return value


def _special(metadata: Mapping[str, Any], role: str) -> str | None:
    """Text of the token in `tokenizer.ggml.{role}_token_id`, or None if the key is absent."""
    token = special_id(metadata, role)
    return None if token is None else str(metadata["tokenizer.ggml.tokens"][token])
