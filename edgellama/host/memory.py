"""Memory that a process may still have: the system's figure, and the limit of its container."""

from __future__ import annotations

import ctypes
from pathlib import Path

_MEMINFO, _CGROUP, _GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def return_freed_memory() -> None:
    """Gives the system the memory that was freed, where the C library keeps it for later (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # no such function, or no such library (Windows)
        return


def free_memory() -> int | None:
    """Bytes that a new process can have without swapping; None if the system has no figure."""
    return _meminfo().get("MemAvailable")


def available_memory() -> int | None:
    """Bytes that can be had without killing a process, swap included; None if there is no figure (macOS)."""
    limits = [m for m in (_system(), _container()) if m is not None]
    return min(limits, default=None)


def _system() -> int | None:
    rows = _meminfo()
    return rows["MemAvailable"] + rows.get("SwapFree", 0) if "MemAvailable" in rows else None


def _meminfo() -> dict[str, int]:
    """Bytes by the names of /proc/meminfo; empty if there is no such file."""
    if not _MEMINFO.exists():
        return {}
    rows = (row.split() for row in _MEMINFO.read_text(encoding="ascii").splitlines())
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows if len(row) == 3}


def _container() -> int | None:
    """Bytes left by the tightest cgroup (version 2) above this process; inactive file cache is free."""
    if not _CGROUP.exists():
        return None
    own = next((x[3:] for x in _CGROUP.read_text(encoding="utf-8").splitlines() if x.startswith("0::")), None)
    if own is None:
        return None
    folder = _GROUPS / own.strip("/")
    free_bytes = []
    for group in (folder, *folder.parents):
        if not group.is_relative_to(_GROUPS):
            break
        try:
            limit = (group / "memory.max").read_text(encoding="ascii").strip()
            used = int((group / "memory.current").read_text(encoding="ascii"))
            rows = dict(x.split() for x in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):
            continue
        if limit.isdecimal():
            free_bytes.append(max(0, int(limit) - used + int(rows.get("inactive_file", 0))))
    return min(free_bytes, default=None)
