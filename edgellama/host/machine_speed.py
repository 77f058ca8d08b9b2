"""Speed of this machine, measured in a second and remembered, for forecasts of time.

Times are processor seconds of one thread, so other work on the machine changes them little. Three kinds of work
stand for an export: float32 products, reading of weights, and Python.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgellama.files import digest, read_json, to_json
from edgellama.host.cache import cache_directory, touch, trim
from edgellama.host.threads import one_thread
from edgellama.host.versions import installed_versions

_SECONDS = 0.15  # processor time of one measurement
_TURNS = 3  # the fastest one counts: the others were disturbed
_LOOP = 20_000  # turns of Python's loop
_LIMIT = 1 << 16  # bytes of the folder in the cache


@dataclass(frozen=True)
class Speed:
    """Work in one processor second of one thread.

    Attributes:
        products: floating-point operations of float32 matrix products.
        memory: bytes of float32 numbers that are read and added up.
        python: turns of a loop that updates a dictionary.
    """

    products: float
    memory: float
    python: float


def machine_speed() -> Speed:
    """Speed of this machine: from the cache, or measured.

    >>> machine_speed().products > 1e8
    True
    """
    entry = _entry()
    if entry is not None:
        with suppress(OSError, ValueError, TypeError):
            known = Speed(**read_json(entry))
            if all(isinstance(x, float) and x > 0 for x in vars(known).values()):
                touch(entry)
                return known
    measured = measure_speed()
    if entry is not None:
        with suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            entry.write_text(to_json(asdict(measured)), encoding="utf-8")
            trim(entry.parent, entry, _LIMIT)
    return measured


@one_thread()
def measure_speed() -> Speed:
    """Measures the speed of this machine, in about two seconds of processor time."""
    import torch

    rows, columns = torch.ones(256, 1024), torch.ones(1024, 1024)
    values = torch.ones(1 << 24)

    def python() -> None:
        counts: dict[int, int] = {}
        for i in range(_LOOP):
            counts[i % 97] = counts.get(i % 89, 0) + i

    return Speed(
        2 * 256 * 1024 * 1024 / _processor_seconds(lambda: torch.mm(rows, columns)),
        values.nbytes / _processor_seconds(values.sum),
        _LOOP / _processor_seconds(python),
    )


def _processor_seconds(work: Callable[[], Any]) -> float:
    """Processor time of one call, in the fastest of several turns."""
    work()
    best = float("inf")
    for _ in range(_TURNS):
        calls, start = 0, time.thread_time()
        while (spent := time.thread_time() - start) < _SECONDS or calls < 2:
            work()
            calls += 1
        best = min(best, spent / calls)
    return best


def _entry() -> Path | None:
    """Cache file of this machine under the versions in use; None if the cache is off."""
    root = cache_directory()
    if root is None:
        return None
    key = {
        "processor": _processor(),
        "count": os.cpu_count(),
        "python": platform.python_version(),
        "versions": installed_versions(("torch", "numpy")),
    }
    return root / "speed" / f"{digest(key)}.json"


def _processor() -> str:
    """Name of the processor, as far as the system tells it."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        named = [x.partition(":")[2].strip() for x in lines if x.startswith(("model name", "CPU part"))]
        if named:
            return f"{platform.machine()} {named[0]}"
    return f"{platform.machine()} {platform.processor()}"
