"""Fuzz tests: tens of thousands of mutated files, each accepted or refused and without side effects.

EDGELLAMA_FUZZ=20 python -m pytest tests/fuzz/test_hostile_input.py runs twenty times as many.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fuzz.formats import CASES, build_seeds

pytestmark = pytest.mark.slow

SCALE = float(os.environ.get("EDGELLAMA_FUZZ", "1"))
HEAVY = (
    "pte",
    "coreml_pte",
    "mlpackage",
    "onnx",
    "links",
)  # formats that import ExecuTorch, coremltools, onnx
MOST_DEATHS = 5  # deaths of the worker, after which the other cases of a format are skipped


@dataclass
class FormatResults:
    """Counts of the outcomes of a format's cases, and its findings by number of the case."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[int, str] = field(default_factory=dict)


def run(work: Path, names: Sequence[str], results: Mapping[str, FormatResults]) -> None:
    """Runs all cases of some formats in a worker. A new worker continues after the case that ended the last one."""
    parts = {name: (0, max(1, int(CASES[name] * SCALE))) for name in names}
    deaths = Counter[str]()
    while parts:
        for name in parts:
            (work / f"{name}.at").unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.formats", str(work)]
            + [word for name, (first, count) in parts.items() for word in (name, str(first), str(count))],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"},
        )
        for line in done.stdout.splitlines():
            if line.startswith('["'):
                name, number, outcome, finding = json.loads(line)
                results[name].outcomes[outcome] += 1
                if finding:
                    results[name].findings[number] = finding
        if done.returncode == 0:
            return
        begun = [name for name in parts if (work / f"{name}.at").exists()]
        assert begun, done.stderr[-2000:]
        last = begun[-1]
        (number,) = struct.unpack("<q", (work / f"{last}.at").read_bytes())
        ending = f"the process ended with {done.returncode}: {done.stderr[-400:]}"
        results[last].findings[number] = ending
        deaths[last] += 1
        first, count = parts[last]
        rest = (number + 1, first + count - number - 1 if deaths[last] < MOST_DEATHS else 0)
        later = list(parts)[list(parts).index(last) + 1 :]
        parts = {name: parts[name] for name in later} | ({last: rest} if rest[1] > 0 else {})


@pytest.fixture(scope="module")
def results_by_format(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, FormatResults]:
    work = tmp_path_factory.mktemp("fuzz")
    build_seeds(work)
    results = {name: FormatResults() for name in CASES}
    light = [name for name in CASES if name not in HEAVY]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda names: run(work, names, results), (light, HEAVY)))
    return results


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_accepted_or_refused_in_one_sentence(
    name: str, results_by_format: Mapping[str, FormatResults]
) -> None:
    results = results_by_format[name]
    first = dict(list(results.findings.items())[:5])
    assert not results.findings, f"{len(results.findings)} of {results.outcomes.total()} cases: {first}"
    assert results.outcomes["refused"] > 0, "no case was refused: the mutations miss the parts that are read"
    assert name == "links" or results.outcomes["accepted"] > 0, "no case was accepted: the seed is not read"


def test_there_are_at_least_20_000_cases() -> None:
    assert sum(CASES.values()) >= 20_000
