"""Bytes inside a file, which are read when they are needed and kept by nobody."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_PIECE = 1 << 20  # bytes that are hashed at a time


@dataclass(frozen=True, eq=False)
class StoredBytes:
    """Bytes of the file at `path`, from `offset` on. They compare with others, and with `bytes`, by content.

    >>> file = Path(model) / "config.json"
    >>> piece = StoredBytes(file, 2, 9)
    >>> len(piece[1:]), bytes(piece[1:]) == file.read_bytes()[3:11]
    (8, True)
    >>> piece == file.read_bytes()[2:11]
    True
    """

    path: Path
    offset: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __bytes__(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise OSError(0, "the file ends too early", str(self.path))
        return content

    def __getitem__(self, part: slice) -> StoredBytes:
        start, stop, step = part.indices(self.size)
        if step != 1:
            raise ValueError(f"only a step of 1 is possible, got {part.step!r}")
        return StoredBytes(self.path, self.offset + start, max(0, stop - start))

    @cached_property
    def sha256(self) -> str:
        """Hash of the content, computed once, from a few pages at a time."""
        total = hashlib.sha256()
        for start in range(0, self.size, _PIECE):
            total.update(bytes(self[start : start + _PIECE]))
        return total.hexdigest()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, bytes):
            return len(other) == self.size and bytes(self) == other
        if not isinstance(other, StoredBytes):
            return NotImplemented
        if (self.path, self.offset, self.size) == (other.path, other.offset, other.size):
            return True
        return self.size == other.size and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.size)


Content = bytes | StoredBytes
