"""Bytes of a GGUF file: every block of 32 weights has a float16 scale of its own."""

from __future__ import annotations

from edgellama.formats.gguf_blocks import BLOCK
from edgellama.targets.base import Storage


class BlockStorage(Storage):
    """Storage in blocks of one size. Groups and rows that are longer repeat their scale."""

    def scale_bytes(self, columns: int, group_size: int | None) -> int:
        return columns // BLOCK * self.group_scale_bytes

    def vocabulary_bytes(self, tokens: int) -> int:
        # A token's text and type, and its merges. SmolLM2 has 36 bytes; Llama 3 has two merges a token.
        return tokens * (36 if tokens < 100_000 else 55)


STORAGE = BlockStorage(
    float_bytes=4,
    row_scale_bytes=2,
    tied_once=True,
    rope_width=0.0,
    program=20_000,
    layer_program=700,
)
