"""Fuzz tests: tens of thousands of mutated files, each accepted or refused and without side effects.

EDGELLAMA_FUZZ=20 python -m pytest tests/fuzz/test_hostile_input.py runs twenty times as many.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fuzz.formats import CASES, build_seeds
from tests.fuzz.runs import HEAVY, LIGHT, FormatResults, run

pytestmark = pytest.mark.slow

SCALE = float(os.environ.get("EDGELLAMA_FUZZ", "1"))


@pytest.fixture(scope="module")
def results_by_format(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, FormatResults]:
    work = tmp_path_factory.mktemp("fuzz")
    build_seeds(work)
    results = {name: FormatResults() for name in CASES}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda names: run(work, names, results, scale=SCALE), (LIGHT, HEAVY)))
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
