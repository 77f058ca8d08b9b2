"""Payloads of delegates in a file beside the artifact, until the artifact is written.

ExecuTorch collects the constants of all delegates as `bytes`, and writes them when the program is complete. Here
they are `bytes` that hold the hash of a content which lies in the file, and have its length. So no copy of the
weights is in memory beside the model. ExecuTorch compares constants by content or hash: equal hashes stand for both.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

SMALL = 1 << 20  # bytes of a content that stays in memory
_COPIED = 1 << 22  # bytes at a time


class SpooledBytes(bytes):
    """Bytes that lie in a spool: as `bytes` their SHA-256, with the length of the content."""

    offset: int
    size: int

    def __len__(self) -> int:
        return self.size


class Spool:
    """File that payloads are appended to, and read from when the artifact is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._end = file, 0

    def add(self, content: bytes, sha256: bytes) -> bytes:
        """Appends `content` with this hash, and returns bytes that stand for it. Small contents stay in memory."""
        if len(content) <= SMALL:
            return content
        spooled = SpooledBytes(sha256)
        spooled.offset, spooled.size = self._end, len(content)
        self._file.seek(self._end)
        self._file.write(content)
        self._end += len(content)
        return spooled

    def restored(self, target: BinaryIO) -> io.BufferedIOBase:
        """Writer to `target` that replaces what stands for a content by the content."""
        return cast(io.BufferedIOBase, _Restored(self, target))

    def copy(self, spooled: SpooledBytes, target: BinaryIO) -> None:
        """Writes the content of `spooled` to `target`."""
        self._file.seek(spooled.offset)
        target.writelines(
            self._file.read(min(_COPIED, spooled.size - start)) for start in range(0, spooled.size, _COPIED)
        )


class _Restored:
    def __init__(self, spool: Spool, target: BinaryIO) -> None:
        self._spool, self._target = spool, target

    def write(self, content: bytes) -> int:
        if isinstance(content, SpooledBytes):
            self._spool.copy(content, self._target)
        else:
            self._target.write(content)
        return len(content)


@contextmanager
def spool_beside(path: Path) -> Iterator[Spool]:
    """Spool in a nameless file in the directory of `path`."""
    with tempfile.TemporaryFile(dir=path.parent) as file:
        yield Spool(cast(BinaryIO, file))
