"""Files of strangers: tens of thousands of mutated ones, none of which may do more than be refused.

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

from tests.fuzz.formats import CASES, build

SCALE = float(os.environ.get("EDGELLAMA_FUZZ", "1"))
HEAVY = ("pte", "coreml_pte", "mlpackage", "onnx", "links")  # what imports ExecuTorch, coremltools and onnx
MOST_DEATHS = 5  # of the worker, after which the rest of a format is not tried


@dataclass
class Found:
    """What became of a format's cases; wrong: by case, what should not have happened."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: dict[int, str] = field(default_factory=dict)


def run(work: Path, names: Sequence[str], found: Mapping[str, Found]) -> None:
    """All cases of some formats, in one process after another: each goes on behind the case that ended the last one."""
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
                name, number, outcome, wrong = json.loads(line)
                found[name].outcomes[outcome] += 1
                if wrong:
                    found[name].wrong[number] = wrong
        if done.returncode == 0:
            return
        begun = [name for name in parts if (work / f"{name}.at").exists()]
        assert begun, done.stderr[-2000:]
        last = begun[-1]
        (number,) = struct.unpack("<q", (work / f"{last}.at").read_bytes())
        found[last].wrong[number] = f"the process ended with {done.returncode}: {done.stderr[-400:]}"
        deaths[last] += 1
        first, count = parts[last]
        rest = (number + 1, first + count - number - 1 if deaths[last] < MOST_DEATHS else 0)
        later = list(parts)[list(parts).index(last) + 1 :]
        parts = {name: parts[name] for name in later} | ({last: rest} if rest[1] > 0 else {})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Found]:
    work = tmp_path_factory.mktemp("fuzz")
    build(work)
    found = {name: Found() for name in CASES}
    light = [name for name in CASES if name not in HEAVY]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda names: run(work, names, found), (light, HEAVY)))
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_accepted_or_refused_in_one_sentence(name: str, results: Mapping[str, Found]) -> None:
    found = results[name]
    first = dict(list(found.wrong.items())[:5])
    assert not found.wrong, f"{len(found.wrong)} of {found.outcomes.total()} cases: {first}"
    assert found.outcomes["refused"] > 0, "nothing was ever refused: the mutations miss what is read"
    assert name == "links" or found.outcomes["accepted"] > 0, (
        "nothing was ever accepted: the seed is not read"
    )


def test_the_cases_are_as_many_as_promised() -> None:
    assert sum(CASES.values()) >= 20_000
