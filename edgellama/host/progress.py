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


def duration(seconds: float) -> str:
    """Length of time for people, to about a tenth of it.

    >>> duration(8), duration(95), duration(3700), duration(9000)
    ('10 s', '2 min', '62 min', '2 h 30 min')
    """
    if seconds < 60:
        return f"{max(10, round(seconds, -1)):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Pace:
    """Time left of work in steps of about equal length, judged by the steps of this run.

    total: number of steps.
    """

    def __init__(self, total: int) -> None:
        self._total, self._done, self._worked = total, 0, 0
        self._last = time.perf_counter()
        self._spent = 0.0

    def step(self, *, worked: bool = True) -> str:
        """Counts a step and says how many are done, and the time left.

        worked: False for a step that was only loaded. It tells nothing about those to come.
        """
        now = time.perf_counter()
        self._done += 1
        if worked:
            self._worked += 1
            self._spent += now - self._last
        self._last = now
        count = f"{self._done} of {self._total}"
        if self._done == self._total or not self._worked:
            return count
        return f"{count}, about {duration((self._total - self._done) * self._spent / self._worked)} left"


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

    def summary(self) -> str:
        """One line with the time of all stages and the share of each that took a tenth or more of it."""
        seconds: dict[str, float] = {}
        for stage in self.stages:
            seconds[stage["name"]] = seconds.get(stage["name"], 0.0) + stage["seconds"]
        total = sum(seconds.values())
        longest = sorted(seconds.items(), key=lambda item: -item[1])
        shares = [f"{name} {s / total:.0%}" for name, s in longest if s >= total / 10]
        return f"{total:.0f} s in all: {', '.join(shares)}" if shares else f"{total:.0f} s in all"

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
