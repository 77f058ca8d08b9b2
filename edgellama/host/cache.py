"""Cache directory of this user on this machine: its place, and its size limit.

Each folder below it belongs to one module: `calibration` to export/quantization/calibration_cache.py, `bundles`
to bundle/vouchers.py, `speed` to host/machine_speed.py.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

VARIABLE, OFF = "EDGELLAMA_CACHE", "off"


def cache_directory() -> Path | None:
    """Root of the cache: $EDGELLAMA_CACHE, or edgellama in $XDG_CACHE_HOME or ~/.cache. None if it is off."""
    setting = os.environ.get(VARIABLE)
    if setting == OFF:
        return None
    if setting:
        return Path(setting)
    return user_caches() / "edgellama"


def user_caches() -> Path:
    """Directory of this user's caches, of all programs: $XDG_CACHE_HOME or ~/.cache."""
    caches = os.environ.get("XDG_CACHE_HOME")
    return Path(caches).expanduser() if caches else Path.home() / ".cache"


def touch(entry: Path) -> None:
    """Marks a cache entry as recently used."""
    try:
        os.utime(entry)
    except OSError:  # missing, or owned by another user
        return


def trim(directory: Path, keep: Path, limit: int) -> None:
    """Removes the least recently used entries of `directory`, except `keep`, down to `limit` bytes.

    Another process may trim at the same time, or use an entry that is removed. It then computes that entry
    again.
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
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
            total -= sizes[entry]


def _bytes(entry: Path) -> int:
    total = 0
    for file in [entry] if entry.is_file() else entry.rglob("*"):
        try:
            total += file.stat().st_size
        except OSError:  # removed in the meantime
            continue
    return total
