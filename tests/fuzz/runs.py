"""Runs of the fuzz worker over many cases, for the tests and for campaigns of any length.

    python -m tests.fuzz.runs WORK SCALE [PASSES]      (SCALE times the cases of a plain run in each pass)

A campaign runs one process at a time, and each pass has cases of every format that no pass before it had. WORK is
an empty directory, best one in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.formats import CASES, build_seeds

# Formats that import ExecuTorch, coremltools, onnx.
HEAVY = ("pte", "coreml_pte", "mlpackage", "onnx", "links")
LIGHT = tuple(name for name in CASES if name not in HEAVY)
MOST_DEATHS = 5  # deaths of the worker, after which the other cases of a format are skipped


@dataclass
class FormatResults:
    """Counts of the outcomes of a format's cases, and its findings by number of the case."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[int, str] = field(default_factory=dict)


def run(
    work: Path, names: Sequence[str], results: Mapping[str, FormatResults], *, scale: float, earlier: int = 0
) -> None:
    """Runs the cases of some formats in a worker. A new worker continues after the case that ended the last one.

    scale: multiplies the cases of CASES. earlier: passes of the same scale, whose cases are left out.
    """
    counts = {name: max(1, int(CASES[name] * scale)) for name in names}
    parts = {name: (earlier * count, count) for name, count in counts.items()}
    deaths = Counter[str]()
    while parts:
        for name in parts:
            (work / f"{name}.at").unlink(missing_ok=True)
        code, errors = _work(work, parts, results)
        if code == 0:
            return
        begun = [name for name in parts if (work / f"{name}.at").exists()]
        assert begun, errors[-2000:]
        last = begun[-1]
        (number,) = struct.unpack("<q", (work / f"{last}.at").read_bytes())
        results[last].findings[number] = f"the process ended with {code}: {errors[-400:]}"
        deaths[last] += 1
        first, count = parts[last]
        rest = (number + 1, first + count - number - 1 if deaths[last] < MOST_DEATHS else 0)
        later = list(parts)[list(parts).index(last) + 1 :]
        parts = {name: parts[name] for name in later} | ({last: rest} if rest[1] > 0 else {})


def _work(
    work: Path, parts: Mapping[str, tuple[int, int]], results: Mapping[str, FormatResults]
) -> tuple[int, str]:
    """Runs one worker and counts its outcomes as they come. Returns its exit code and its messages."""
    words = [word for name, (first, count) in parts.items() for word in (name, str(first), str(count))]
    with tempfile.TemporaryFile("w+") as messages:
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.formats", str(work), *words],
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"},
        )
        with worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                if line.startswith('["'):
                    name, number, outcome, finding = json.loads(line)
                    results[name].outcomes[outcome] += 1
                    if finding:
                        results[name].findings[number] = finding
                        print(f"{name} {number}: {finding}", file=sys.stderr, flush=True)
        messages.seek(0)
        return worker.returncode, messages.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("scale", type=float)
    parser.add_argument("passes", type=int, nargs="?", default=1)
    args = parser.parse_args()
    work = args.work.resolve()
    build_seeds(work)
    results = {name: FormatResults() for name in CASES}
    for number in range(args.passes):
        for names in (LIGHT, HEAVY):
            run(work, names, results, scale=args.scale, earlier=number)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"pass {number + 1}, {used.ru_utime + used.ru_stime:.0f} s of processor time so far")
        for name, result in results.items():
            counts, findings = result.outcomes, len(result.findings)
            words = f"{counts['accepted']} accepted, {counts['refused']} refused, {findings} findings"
            print(f"{name}: {counts.total()} cases, {words}")
        print(f"sum: {sum(result.outcomes.total() for result in results.values())} cases", flush=True)


if __name__ == "__main__":
    main()
