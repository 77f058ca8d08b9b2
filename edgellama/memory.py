"""How much memory this machine can still give."""

from __future__ import annotations

from pathlib import Path


def free_memory() -> int | None:
    """Bytes that a new process can have without swapping; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None
