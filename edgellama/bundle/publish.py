"""Publishing of a bundle: written beside its destination and put there in one step, by one export at a time.

An export writes everything to the work directory `.NAME.partial` beside the destination NAME:

- lock: Held while the export runs. The system releases it when the process ends, for any reason.
- new: The bundle that is being written. After the exchange, the bundle that was replaced.
- old: The bundle that is being replaced, on a system that cannot exchange two directories.
- tmp: Temporary files of the command line's process.

One system call exchanges the destination and `new` (Linux: renameat2, macOS: renamex_np). A complete bundle
therefore has the name at every moment. On file systems without such a call, the old bundle is first renamed
to `old`. A process killed between the two renames leaves it there, and the next export to the destination
puts it back. The next export also removes the remains of a killed process, once it holds the lock.
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
# Errors of a file system without exchange.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def work_directory(destination: Path) -> Path:
    """Work directory of an export to `destination`."""
    return destination.absolute().parent / f".{destination.name}.partial"


@dataclass(frozen=True)
class Claim:
    """The right to write a bundle to `destination`, held by one process at a time.

    force: replace an existing bundle.
    """

    destination: Path
    force: bool

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """An empty directory, which becomes the destination if the block ends without an error.

        Otherwise the end of the claim removes it.
        """
        work = work_directory(self.destination)
        new = work / "new"
        new.mkdir()
        yield new
        check_destination(self.destination, force=self.force)
        sync(new)
        _put(new, self.destination, work / "old")


@contextmanager
def claimed(destination: Path, *, force: bool) -> Iterator[Claim]:
    """The claim to a destination. The remains of a killed export are removed first.

    Raises UsageError if `check_destination` rejects the destination or another process is writing to it.
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
    """Claims the destination and stages a bundle in one step (`Claim.staged`)."""
    with claimed(destination, force=force) as claim, claim.staged() as directory:
        yield directory


@contextmanager
def temporary_files(destination: Path) -> Iterator[None]:
    """Redirects temporary files of this process to the work directory of `destination` during the block.

    The next export then removes files that a library left behind, and a small /tmp does not matter.
    Python has one setting for all threads, so use it only in a process that does nothing else.
    """
    before = tempfile.tempdir
    tempfile.tempdir = str(work_directory(destination) / "tmp")
    try:
        yield
    finally:
        tempfile.tempdir = before


def sync(directory: Path) -> None:
    """Flushes `directory` and everything below it to the disk, so that it survives a power failure."""
    for at, _, names in os.walk(directory, topdown=False, onerror=raise_error):
        for path in (*(os.path.join(at, name) for name in names), at):
            _sync_one(path)


def _sync_one(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _put(new: Path, destination: Path, old: Path) -> None:
    if not os.path.lexists(destination):
        new.rename(destination)
    elif not exchange(new, destination):
        destination.rename(old)
        new.rename(destination)  # if it fails, `_clean` puts the old bundle back
    _sync_one(destination.absolute().parent)


def exchange(one: Path, other: Path) -> bool:
    """Swaps two directories in one step. False if the system or the file system cannot.

    Raises OSError for any other error.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            result = libc.renamex_np(*paths, _RENAME_SWAP)
        else:
            result = libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    except AttributeError:  # the C library lacks the function
        return False
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(other))


@contextmanager
def _locked(work: Path, destination: Path) -> Iterator[None]:
    """Creates and locks the work directory; removes it at the end."""
    lock = work / "lock"
    try:
        descriptor = _lock(work, lock, destination)
    except BaseException:
        with suppress(OSError):
            work.rmdir()  # succeeds only if it is empty, so no other export uses it
        raise
    try:
        yield
    finally:
        # The lock is removed last, so that its next owner finds an empty directory or creates one.
        _clean(work, destination)
        with suppress(OSError):
            lock.unlink()
            work.rmdir()
        os.close(descriptor)


def _lock(work: Path, lock: Path, destination: Path) -> int:
    """Descriptor of the locked file. Raises UsageError if another process holds the lock."""
    while True:
        with suppress(FileExistsError):
            work.mkdir()
        if work.is_symlink():
            raise UsageError(f"{work} is a symbolic link", remedy="Remove it.")
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # another export has just removed the directory
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
        os.close(descriptor)  # the file was removed before it was locked


def _clean(work: Path, destination: Path) -> None:
    """Removes everything but the lock from the work directory, after this export or a killed one.

    Puts the old bundle back if the destination is missing.
    """
    if not work.is_dir():
        return
    old = work / "old"
    if old.exists() and not os.path.lexists(destination):
        old.rename(destination)
    for path in work.iterdir():
        if path.name != "lock":
            shutil.rmtree(path, ignore_errors=True)


def check_destination(destination: Path, *, force: bool) -> None:
    """Raises UsageError if `destination` exists. With `force`, a bundle may be replaced.

    Also raises it for a name that is not Unicode, a symbolic link, and a missing parent directory.
    """
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
