"""Pieces of a delta: the part of a new file that is computed from a part of an old one, as a zstd frame.

Two methods suit two kinds of change. A zstd frame with the old bytes as its prefix (zstd's patch-from) finds
bytes that moved. A difference byte by byte finds values that changed a little in place, as the codes and
scales of another fine-tune do. Pieces bound the memory of both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np

from edgellama.errors import InputError
from edgellama.release.extras import extra

PIECE = 1 << 25  # bytes of a new file
PREFIX = 3 * PIECE  # bytes of an old file that a piece sees
SHORTEST_PREFIX = 8  # bytes; zstd takes no shorter one
WINDOW_LOG = 27  # of the frames: prefix and piece
LEVEL = 9
DAMAGED = "Fetch the delta again, or make it again with `edgellama delta`."


@dataclass(frozen=True)
class Piece:
    """A piece of a new file. `bytes` of it come from `data` bytes of the delta.

    method: `whole`, `patch`, `difference` or `difference-end`. start, length: place in the old file.
    """

    method: str
    bytes: int
    start: int
    length: int
    data: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def encode(new: BinaryIO, size: int, old: BinaryIO | None, old_size: int) -> Iterator[tuple[Piece, bytes]]:
    """The pieces of a new file of `size` bytes with their data, the shortest of all methods."""
    for offset in range(0, size, PIECE):
        content = new.read(min(PIECE, size - offset))
        candidates = [(Piece("whole", len(content), 0, 0, 0), _compress(content))]
        if old is not None and old_size:
            start = max(0, min(offset - PIECE, old_size - PREFIX))
            prefix = _read(old, start, min(PREFIX, old_size - start))
            patch = Piece("patch", len(content), start, len(prefix), 0)
            if len(prefix) >= SHORTEST_PREFIX:
                candidates.append((patch, _compress(content, prefix)))
            base = _read(old, offset, len(content))
            candidates.append(_difference(content, base, "difference", offset))
            # In place as seen from the end, for a file whose head grew.
            end = offset + len(content) + old_size - size
            start = max(0, end - len(content))
            base = _read(old, start, max(0, end - start))
            candidates.append(_difference(content, base, "difference-end", start))
        piece, data = min(candidates, key=lambda candidate: len(candidate[1]))
        yield Piece(piece.method, piece.bytes, piece.start, piece.length, len(data)), data


def _difference(content: bytes, base: bytes, method: str, start: int) -> tuple[Piece, bytes]:
    piece = Piece(method, len(content), start, len(base), 0)
    return piece, _compress(_minus(content, _padded(base, piece)))


def _padded(base: bytes, piece: Piece) -> bytes:
    """The old bytes of a difference, with zeros where the old file has none."""
    return (
        base.rjust(piece.bytes, b"\0") if piece.method == "difference-end" else base.ljust(piece.bytes, b"\0")
    )


def decode(piece: Piece, data: bytes, old: BinaryIO | None, where: str) -> bytes:
    """The bytes of a piece. Raises InputError for damaged data, and memory stays below four pieces."""
    longest = {"whole": 0, "patch": PREFIX}.get(piece.method, piece.bytes)
    shortest = SHORTEST_PREFIX if piece.method == "patch" else 0
    if not shortest <= piece.length <= longest or (piece.length and old is None):
        raise InputError(f"{where}: a piece does not say which old bytes it needs", remedy=DAMAGED)
    base = b"" if old is None else _read(old, piece.start, piece.length)
    if len(base) != piece.length:
        raise InputError(f"{where}: a piece begins beyond the end of the old file", remedy=DAMAGED)
    content = _decompress(data, piece.bytes, base if piece.method == "patch" else b"", where)
    return _plus(content, _padded(base, piece)) if piece.method.startswith("difference") else content


def _compress(content: bytes, prefix: bytes = b"") -> bytes:
    with extra("delta", purpose="a delta"):
        from backports import zstd
    parameter = zstd.CompressionParameter
    options: dict[int, int] = {parameter.compression_level: LEVEL, parameter.checksum_flag: 0}
    if not prefix:
        return zstd.compress(content, options=options)
    options |= {
        parameter.window_log: max(10, min(WINDOW_LOG, (len(prefix) + len(content)).bit_length())),
        parameter.enable_long_distance_matching: 1,
    }
    return zstd.compress(content, options=options, zstd_dict=zstd.ZstdDict(prefix, is_raw=True).as_prefix)


def _decompress(data: bytes, size: int, prefix: bytes, where: str) -> bytes:
    with extra("delta", purpose="a delta"):
        from backports import zstd
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
    dictionary = zstd.ZstdDict(prefix, is_raw=True).as_prefix if prefix else None
    decompressor = zstd.ZstdDecompressor(zstd_dict=dictionary, options=options)
    try:
        content = decompressor.decompress(data, max_length=size + 1)
    except (zstd.ZstdError, ValueError) as error:
        raise InputError(f"{where}: its data is damaged ({error})", remedy=DAMAGED) from error
    if len(content) != size or not decompressor.eof or decompressor.unused_data:
        raise InputError(f"{where}: its data has another length than it says", remedy=DAMAGED)
    return content


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _minus(content: bytes, base: bytes) -> bytes:
    return (np.frombuffer(content, np.uint8) - np.frombuffer(base, np.uint8)).tobytes()


def _plus(content: bytes, base: bytes) -> bytes:
    return (np.frombuffer(content, np.uint8) + np.frombuffer(base, np.uint8)).tobytes()
