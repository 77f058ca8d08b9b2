"""Delta between two bundles: a file with what changed, from which the old bundle becomes the new one.

Unchanged files are not in it: the new manifest names their hashes. A changed file is made of pieces, each of
them computed from the file of the same path in the old bundle (edgellama/release/delta_pieces.py).
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, SIGNATURES
from edgellama.bundle.schema import conforming
from edgellama.errors import BundleError, InputError
from edgellama.files import file_sha256, read_json_bytes, to_json
from edgellama.release.delta_pieces import DAMAGED, Piece, encode

SCHEMA = "edgellama.delta/1"
LONGEST_HEADER = 1 << 26  # bytes
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class ChangedFile:
    """A file of the new bundle that is in the delta. origin: file of the old bundle that its pieces refer to."""

    path: str
    origin: str | None
    bytes: int
    sha256: str
    pieces: tuple[Piece, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "from": self.origin,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "pieces": [piece.to_dict() for piece in self.pieces],
        }


@dataclass(frozen=True)
class Header:
    """Beginning of a delta. old, new: name and sha256 of the manifest of each bundle.

    start: place of the first piece's data in the file.
    """

    old: tuple[str, str]
    new: tuple[str, str]
    files: tuple[ChangedFile, ...]
    start: int

    @classmethod
    def read(cls, file: BinaryIO, where: str) -> Header:
        """Reads the beginning of a delta. Raises InputError for anything else."""
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size).ljust(_LENGTH.size, b"\xff"))
        if length > LONGEST_HEADER:
            raise InputError(f"{where}: not a delta", remedy="Give a file that `edgellama delta` wrote.")
        try:
            data = read_json_bytes(file.read(length))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: its header is not JSON ({error})", remedy=DAMAGED) from error
        data = conforming(data, "delta", label="header", where=where, remedy=DAMAGED)
        files = tuple(
            ChangedFile(
                f["path"], f["from"], f["bytes"], f["sha256"], tuple(Piece(**piece) for piece in f["pieces"])
            )
            for f in data["files"]
        )
        old, new = ((data[side]["name"], data[side]["manifest"]) for side in ("old", "new"))
        return cls(old, new, files, _LENGTH.size + length)


def write_delta(old: Bundle, new: Bundle, output: Path) -> Header:
    """Writes the delta from `old` to `new` to a file, whole or not at all. Equal bundles give equal bytes.

    Raises BundleError if a file of either bundle is missing or altered.
    """
    for bundle in (old, new):
        if problems := bundle.problems():
            raise BundleError(
                f"{bundle.path}: {'; '.join(problems[:3])}",
                remedy="Export the bundle again, or copy it again.",
            )
    with ExitStack() as stack:
        folder = output.absolute().parent
        data = stack.enter_context(tempfile.TemporaryFile(dir=folder))
        files = [_write_file(old, new, path, data) for path in _changed(old, new)]
        sides = {
            side: {"name": bundle.manifest["name"], "manifest": file_sha256(bundle.path / MANIFEST)}
            for side, bundle in (("old", old), ("new", new))
        }
        header = to_json({"schema": SCHEMA, **sides, "files": [f.to_dict() for f in files]}).encode()
        name = folder / f".{output.name}.{os.getpid()}.partial"  # with the permissions of any new file
        stack.callback(_remove, name)
        with name.open("wb") as partial:
            partial.write(_LENGTH.pack(len(header)) + header)
            data.seek(0)
            while block := data.read(1 << 20):
                partial.write(block)
            partial.flush()
            os.fsync(partial.fileno())
        os.replace(name, output)
    with output.open("rb") as written:
        return Header.read(written, str(output))


def _changed(old: Bundle, new: Bundle) -> Iterator[str]:
    """Paths of the new bundle that the delta needs: the manifest first, signatures last."""
    known = {entry["sha256"] for entry in old.manifest["files"].values()}
    yield MANIFEST
    yield from (path for path, entry in sorted(new.manifest["files"].items()) if entry["sha256"] not in known)
    yield from (name for name in SIGNATURES if (new.path / name).is_file())


def _write_file(old: Bundle, new: Bundle, path: str, data: BinaryIO) -> ChangedFile:
    """Appends the pieces of a file to `data`."""
    origin = path if path == MANIFEST or path in old.manifest["files"] else None
    source, size = new.path / path, (new.path / path).stat().st_size
    pieces = []
    with ExitStack() as stack:
        file = stack.enter_context(source.open("rb"))
        base = None if origin is None else stack.enter_context((old.path / origin).open("rb"))
        base_size = 0 if origin is None else (old.path / origin).stat().st_size
        for piece, content in encode(file, size, base, base_size):
            data.write(content)
            pieces.append(piece)
    return ChangedFile(path, origin, size, file_sha256(source), tuple(pieces))


def _remove(name: Path) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name)
