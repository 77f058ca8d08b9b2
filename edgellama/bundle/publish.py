"""How a bundle comes to its place: written beside it, put there in one step, by one export at a time.

Everything that an export writes lies in `.NAME.partial` beside the destination NAME:

    lock    held while the export runs; the system lets go of it when the process dies, however it dies
    new     the bundle that is being written; after the exchange, the one that was replaced
    old     where the system cannot exchange two directories: the bundle that is being replaced
    tmp     temporary files of the command line's process

The destination and `new` are exchanged by one call of the system (Linux: renameat2, macOS: renamex_np), so that there
is no moment without a whole bundle under the name. Where the file system has no such call, the old bundle is renamed to
`old` first; a process killed between the two renames leaves it there, and the next export to the place puts it back.
What a killed process left is removed by the next export to the same place, once it holds the lock.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edgellama.bundle.bundle import is_bundle
from edgellama.errors import UsageError
from edgellama.files import raise_error

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux, <fcntl.h> and <linux/fs.h>
_RENAME_SWAP = 2  # macOS, <sys/stdio.h>
_CANNOT = (
    errno.ENOSYS,
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EPERM,
)  # a file system without exchange says one of these


def work_directory(destination: Path) -> Path:
    """Where an export to `destination` writes."""
    return destination.absolute().parent / f".{destination.name}.partial"


@dataclass(frozen=True)
class Claim:
    """The right to write a bundle to `destination`, held by one process at a time."""

    destination: Path
    force: bool

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """An empty directory that becomes the destination when the block ends without an error, and vanishes otherwise."""
        work = work_directory(self.destination)
        new = work / "new"
        new.mkdir()
        yield new
        check_destination(self.destination, force=self.force)
        sync(new)
        _put(new, self.destination, work / "old")


@contextmanager
def claimed(destination: Path, *, force: bool) -> Iterator[Claim]:
    """The claim to a destination; what an export that was killed left there is removed first.

    Raises UsageError when the destination is not free (`check_destination`), or another process is writing to it.
    """
    check_destination(destination, force=force)
    work = work_directory(destination)
    with _locked(work, destination):
        _clean(work, destination)
        check_destination(destination, force=force)
        (work / "tmp").mkdir()
        yield Claim(destination, force)


@contextmanager
def staged(destination: Path, *, force: bool) -> Iterator[Path]:
    """`Claim.staged` where nothing is done between the two."""
    with claimed(destination, force=force) as claim, claim.staged() as directory:
        yield directory


@contextmanager
def temporary_files(destination: Path) -> Iterator[None]:
    """While a command exports to `destination`, temporary files of this process go to the work directory.

    So whatever a library leaves behind, when it is killed say, goes where the next export cleans up; and a small /tmp does
    not matter. For a process that does nothing else: Python has one setting for all threads.
    """
    before = tempfile.tempdir
    tempfile.tempdir = str(work_directory(destination) / "tmp")
    try:
        yield
    finally:
        tempfile.tempdir = before


def sync(directory: Path) -> None:
    """Everything below `directory`, and itself, is on the disk and not only on its way: power may fail afterwards."""
    for at, _, names in os.walk(directory, topdown=False, onerror=raise_error):
        for path in (*(os.path.join(at, name) for name in names), at):
            _sync_one(path)


def _sync_one(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # some network file systems cannot flush a directory
            raise
    finally:
        os.close(descriptor)


def _put(new: Path, destination: Path, old: Path) -> None:
    if not os.path.lexists(destination):
        new.rename(destination)
    elif not exchange(new, destination):
        destination.rename(old)
        new.rename(destination)  # should it fail, `_clean` puts the old one back
    _sync_one(destination.absolute().parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            result = libc.renamex_np(*paths, _RENAME_SWAP)
        else:
            result = libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    except AttributeError:  # a C library without it
        return False
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(other))


@contextmanager
def _locked(work: Path, destination: Path) -> Iterator[None]:
    """The work directory, ours alone; removed at the end."""
    lock = work / "lock"
    try:
        descriptor = _lock(work, lock, destination)
    except BaseException:
        with suppress(OSError):
            work.rmdir()  # where it is empty, it is ours
        raise
    try:
        yield
    finally:
        # The lock goes last: whoever takes it next finds an empty directory, or makes one.
        _clean(work, destination)
        with suppress(OSError):
            lock.unlink()
            work.rmdir()
        os.close(descriptor)


def _lock(work: Path, lock: Path, destination: Path) -> int:
    """The descriptor of the locked file. Raises UsageError when another process holds it."""
    while True:
        with suppress(FileExistsError):
            work.mkdir()
        if work.is_symlink():
            raise UsageError(f"{work} is a symbolic link", remedy="Remove it.")
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # its owner has just removed it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise UsageError(
                f"another export is writing to {destination}",
                remedy="Wait for it to end, or choose another name with -o.",
            ) from error
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a file that was removed before we had it


def _clean(work: Path, destination: Path) -> None:
    """Remove all but the lock, from this export or from one that was killed; a bundle that lost its place gets it back."""
    if not work.is_dir():
        return
    old = work / "old"
    if old.exists() and not os.path.lexists(destination):
        old.rename(destination)
    for path in work.iterdir():
        if path.name != "lock":
            shutil.rmtree(path, ignore_errors=True)


def check_destination(destination: Path, *, force: bool) -> None:
    """Refuse a destination that exists, before any work; with `force`, only a bundle may be replaced."""
    try:
        destination.name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{str(destination)!r}: this name is not Unicode, and the manifest holds it",
            remedy="Choose another name with -o.",
        ) from error
    if not destination.exists() and not destination.is_symlink():
        if not destination.absolute().parent.is_dir():
            raise UsageError(
                f"{destination.parent}: no such directory",
                remedy="Create it, or choose another place with -o.",
            )
        return
    if not force:
        raise UsageError(
            f"{destination} exists", remedy="Use --force to replace it, or choose another name with -o."
        )
    if destination.is_symlink() or not is_bundle(destination):
        raise UsageError(
            f"{destination} exists and is not a bundle; --force replaces bundles only",
            remedy="Choose another name with -o, or remove it yourself.",
        )
