"""Application of a delta: the new bundle, made of the old one and verified before anybody sees it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, SIGNATURES
from edgellama.bundle.publish import staged
from edgellama.errors import BundleError, InputError, ResourceError
from edgellama.files import file_sha256
from edgellama.release.delta import ChangedFile, Header
from edgellama.release.delta_pieces import DAMAGED, decode

_RESERVE = 1 << 20  # bytes of the disk that stay free


def apply_delta(
    old: Bundle,
    delta: Path,
    output: Path,
    *,
    force: bool = False,
    check: Callable[[Path], object] | None = None,
) -> Bundle:
    """Makes the new bundle at `output`, which may be the old bundle's own place with `force`.

    It is put there in one step, after every file was compared with the new manifest. Every failure leaves the
    old bundle alone.

    check: called with the finished directory before that, and may raise.

    Raises InputError for a damaged delta or one for another bundle, BundleError if the old bundle is damaged,
    and ResourceError if the disk is too small.
    """
    try:
        with delta.open("rb") as file:
            return _apply(old, file, str(delta), output, force, check)
    except OSError as error:
        if error.filename == str(delta):
            raise InputError(f"{delta}: {error.strerror}", remedy="Check the path of the delta.") from error
        raise


def _apply(
    old: Bundle,
    delta: BinaryIO,
    where: str,
    output: Path,
    force: bool,
    check: Callable[[Path], object] | None,
) -> Bundle:
    header = Header.read(delta, where)
    if file_sha256(old.path / MANIFEST) != header.old[1]:
        raise InputError(
            f"{where}: made for another bundle, named {header.old[0]!r}, and not for {old.path}",
            remedy="Give the bundle that the delta was made from.",
        )
    if problems := old.problems():
        raise BundleError(
            f"{old.path}: {'; '.join(problems[:3])}", remedy="Take the whole new bundle instead of a delta."
        )
    with staged(output, force=force) as directory:
        first, *others = header.files
        if first.path != MANIFEST or first.sha256 != header.new[1]:
            raise InputError(f"{where}: it does not begin with the new manifest", remedy=DAMAGED)
        _check_room(output, [first])
        _write(first, old, delta, directory, where)
        new = Bundle.open(directory)
        entries = new.manifest["files"]
        _check_names(others, set(entries), where)
        _check_room(output, others)
        for changed in others:
            _write(changed, old, delta, directory, where)
        if delta.read(1):
            raise InputError(f"{where}: there is more data than it says", remedy=DAMAGED)
        origins = {entry["sha256"]: path for path, entry in old.manifest["files"].items()}
        for path in entries.keys() - {changed.path for changed in others}:
            origin = origins.get(entries[path]["sha256"])
            if origin is None:
                raise InputError(f"{where}: {path} is neither in it nor in {old.path}", remedy=DAMAGED)
            _make_parent(directory, path)
            shutil.copyfile(old.path / origin, directory / path)
        if problems := new.problems():
            raise InputError(f"{where}: {'; '.join(problems[:3])}", remedy=DAMAGED)
        if check is not None:
            check(directory)
    return Bundle.open(output)


def _check_names(changed: list[ChangedFile], named: set[str], where: str) -> None:
    """Raises InputError for a file that is no part of the new bundle, or comes twice."""
    paths = [file.path for file in changed]
    strange = [path for path in paths if path not in named and path not in SIGNATURES]
    if strange or len(set(paths)) < len(paths):
        raise InputError(
            f"{where}: it has {strange[0] if strange else 'a file'!r} where the new bundle has none",
            remedy=DAMAGED,
        )


def _check_room(output: Path, changed: list[ChangedFile]) -> None:
    needed = sum(file.bytes for file in changed) + _RESERVE
    free = shutil.disk_usage(output.absolute().parent).free
    if needed > free:
        raise ResourceError(
            f"{output}: the new files have {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB of the disk are free",
            remedy="Free some space, or choose another disk with -o.",
        )


def _write(changed: ChangedFile, old: Bundle, delta: BinaryIO, directory: Path, where: str) -> None:
    """Writes a file of the new bundle, and compares its hash with the delta's."""
    if changed.origin is not None and changed.origin not in {*old.manifest["files"], MANIFEST}:
        raise InputError(f"{where}: {changed.origin!r} is no file of the old bundle", remedy=DAMAGED)
    _make_parent(directory, changed.path)
    total, place = hashlib.sha256(), f"{where}: {changed.path}"
    if sum(piece.bytes for piece in changed.pieces) != changed.bytes:
        raise InputError(f"{place}: its pieces have another length than the file", remedy=DAMAGED)
    with ExitStack() as stack:
        file = stack.enter_context((directory / changed.path).open("wb"))
        base = None
        if changed.origin is not None:
            base = stack.enter_context((old.path / changed.origin).open("rb"))
        for piece in changed.pieces:
            data = delta.read(piece.data)
            if len(data) != piece.data:
                raise InputError(f"{where}: it ends early", remedy=DAMAGED)
            content = decode(piece, data, base, place)
            total.update(content)
            file.write(content)
    if total.hexdigest() != changed.sha256:
        raise InputError(f"{place}: its data is damaged", remedy=DAMAGED)


def _make_parent(directory: Path, path: str) -> None:
    (directory / path).parent.mkdir(parents=True, exist_ok=True)
