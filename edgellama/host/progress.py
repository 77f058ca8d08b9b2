"""Progress of long work: lines and, on a terminal, bars. Library users see neither unless they ask."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm


def peak_resident_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


class Progress:
    """Named stages with their times, and bars for countable work. `stream` None is silent.

    seconds: duration of every finished stage, by name.
    stages: the same with processor time and peak memory, for machines to read.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream
        self.seconds: dict[str, float] = {}
        self.stages: list[dict[str, Any]] = []

    def say(self, line: str) -> None:
        """Prints a line, if there is a stream."""
        if self.stream is not None:
            print(line, file=self.stream, flush=True)

    def tick(self, line: str) -> None:
        """Prints a step of long work to a log, which shows no bar."""
        if self.stream is not None and not self.stream.isatty():
            self.say(line)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage, and prints a line at its start and at its end."""
        start, processor = time.perf_counter(), time.process_time()
        self.say(f"{name} …")
        yield
        self.seconds[name] = time.perf_counter() - start
        self.stages.append(
            {
                "name": name,
                "seconds": round(self.seconds[name], 3),
                "processor_seconds": round(time.process_time() - processor, 3),
                "peak_resident_bytes": peak_resident_bytes(),
            }
        )
        self.say(f"{name}: {self.seconds[name]:.1f} s")

    @contextmanager
    def bar(self, name: str, total: int, unit: str) -> Iterator[tqdm[Any]]:
        """Bar to `update(n)`, shown on a terminal. In a log, the lines of the stage show that it runs."""
        interactive = self.stream is not None and self.stream.isatty()
        with tqdm(
            desc=name,
            total=total,
            unit=unit,
            file=self.stream,
            disable=not interactive,
            leave=False,
            dynamic_ncols=True,
        ) as bar:
            yield bar
