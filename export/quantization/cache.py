"""The cache of calibrated codes: where it lies, how large it grows, and what goes first.

`EDGELLAMA_CACHE` names its directory, or says `off`; without it the cache is `edgellama` in $XDG_CACHE_HOME or ~/.cache. Each
calibration has a directory of its own, named by the hash of all that decides its codes. Together they hold at most
LIMIT bytes: when there are more, the calibration that was used longest ago goes, and so on. It may be deleted at any time.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

VARIABLE, OFF = "EDGELLAMA_CACHE", "off"
LIMIT = 8 * 10**9  # bytes; a calibration takes about as many as its model has weights in its layers


def cache_directory() -> Path | None:
    """Where calibrations are kept; None where they are not."""
    named = os.environ.get(VARIABLE)
    if named == OFF:
        return None
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgellama"


def touch(entry: Path) -> None:
    """Note that an entry of the cache is being used."""
    try:
        os.utime(entry)
    except OSError:  # not there yet, or not ours
        return


def trim(directory: Path, keep: Path, limit: int = LIMIT) -> None:
    """Remove entries of `directory`, those used longest ago first, until `limit` is kept; never `keep`.

    Another process may be doing the same, or be using an entry: it then computes again what is gone.
    """
    try:
        entries = sorted((entry.stat().st_mtime, entry) for entry in directory.iterdir())
    except OSError:
        return
    sizes = {entry: _bytes(entry) for _, entry in entries}
    total = sum(sizes.values())
    for _, entry in entries:
        if total <= limit:
            return
        if entry != keep:
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]


def _bytes(entry: Path) -> int:
    total = 0
    for file in entry.rglob("*"):
        try:
            total += file.stat().st_size
        except OSError:  # gone meanwhile
            continue
    return total
