"""Incremental decoding: text of token ids that arrive one by one, equal to decoding all of them at once."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from typing import Any, Protocol

import tokenizers

_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenStream:
    """Incremental decoder. The joined pieces equal `decode` of all the ids, for every sequence.

    `push` returns only text that no later token can change. Half an emoji waits for its other half. A run of
    SentencePiece byte tokens waits for the token after it, since one bad byte makes the whole run unreadable.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, decoder: Mapping[str, Any] | None) -> None:
        """Decodes for `tokenizer`; `decoder` is that section of tokenizer.json. Skips special tokens."""
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._skipped = frozenset(i for i, token in added.items() if token.special)
        self._text = _incremental(tokenizer, decoder)

    def push(self, token: int) -> str:
        """Text that became certain with this token: often the token's own, possibly empty."""
        if token in self._skipped:
            return ""
        piece = self._tokenizer.id_to_token(token)
        return "" if piece is None else self._text.push(piece)

    def flush(self) -> str:
        """Text still waiting, as `decode` shows it: U+FFFD for bytes that never became a character."""
        return self._text.flush()


def byte_characters() -> dict[int, str]:
    """GPT-2's table: byte -> printable character that stands for it in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


BYTE_OF_CHARACTER = {character: byte for byte, character in byte_characters().items()}


def byte_of_piece(piece: str) -> int | None:
    """Byte of a SentencePiece byte token <0xNN>, None for any other piece."""
    match = _BYTE_PIECE.fullmatch(piece)
    return int(match[1], 16) if match else None


class _Incremental(Protocol):
    def push(self, piece: str) -> str: ...

    def flush(self) -> str: ...


class _ByteLevel:
    """Pieces whose characters stand for bytes. A piece with any other character is its own text."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: str) -> str:
        try:
            return self._utf8.decode(bytes(BYTE_OF_CHARACTER[c] for c in piece))
        except KeyError:
            return self._utf8.decode(piece.encode())

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _SentencePiece:
    """Pieces with `space` for spaces and <0xNN> for bytes. Drops up to `strip` spaces at the very start."""

    def __init__(self, space: str, *, strip: int) -> None:
        self._space, self._strip = space, strip
        self._bytes = bytearray()

    def push(self, piece: str) -> str:
        piece = piece.replace(self._space, " ")
        byte = byte_of_piece(piece)
        if byte is None:
            return self._start(self._run() + piece)
        self._bytes.append(byte)
        return ""

    def flush(self) -> str:
        return self._start(self._run())

    def _run(self) -> str:
        run, self._bytes = bytes(self._bytes), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _start(self, text: str) -> str:
        while self._strip and text.startswith(" "):
            text, self._strip = text[1:], self._strip - 1
        if text:
            self._strip = 0
        return text


class _Whole:
    """Any other decoder: no text is certain before the end."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._decoder = tokenizer.decoder
        self._pieces: list[str] = []

    def push(self, piece: str) -> str:
        self._pieces.append(piece)
        return ""

    def flush(self) -> str:
        pieces, self._pieces = self._pieces, []
        return " ".join(pieces) if self._decoder is None else str(self._decoder.decode(pieces))


def _incremental(tokenizer: tokenizers.Tokenizer, decoder: Mapping[str, Any] | None) -> _Incremental:
    """Incremental equivalent of tokenizer.json's `decoder`."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    match steps:
        case [{"type": "ByteLevel"}]:
            return _ByteLevel()
        case [
            {"type": "Replace", "pattern": {"String": str(space)}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            *rest,
        ]:
            match rest:
                case []:
                    return _SentencePiece(space, strip=0)
                case [{"type": "Strip", "content": " ", "start": int(strip), "stop": 0}]:
                    return _SentencePiece(space, strip=strip)
    return _Whole(tokenizer)
