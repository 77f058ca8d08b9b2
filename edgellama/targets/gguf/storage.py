"""Bytes of a GGUF file: every block of 32 weights has a float16 scale of its own."""

from __future__ import annotations

from edgellama.formats.gguf_blocks import BLOCK
from edgellama.targets.base import Storage


class BlockStorage(Storage):
    """Storage in blocks of one size. Groups and rows that are longer repeat their scale."""

    def scale_bytes(self, columns: int, group_size: int | None) -> int:
        return columns // BLOCK * self.group_scale_bytes


STORAGE = BlockStorage(
    float_bytes=4,
    row_scale_bytes=2,
    tied_once=True,
    rope_width=0.0,
    # A token's text, its type and the merge that makes it: SmolLM2 has 35 bytes a token, Llama 3 has 55.
    token_bytes=36,
    program=20_000,
    layer_program=700,
)
