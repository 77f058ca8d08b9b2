"""Tests that tests/vectors is current: the Python side computes the same values today.

The Kotlin and Swift cores are tested against these files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellama.bundle import Bundle
from edgellama.bundle.golden import read_golden
from tests.helpers.paths import VECTORS
from tests.make_vectors import vector_files

pytestmark = pytest.mark.slow

# Not equal to the last digit.
NEARLY = ("golden.json", "challenge.json", "classify.json", "guard.json", "manifest.json")
REMEDY = "run `python -m tests.make_vectors` and look at what changed"


@pytest.fixture(scope="module")
def current_files() -> dict[Path, bytes]:
    return vector_files()


def test_the_vectors_are_current(current_files: dict[Path, bytes]) -> None:
    for path, content in current_files.items():
        assert path.is_file(), f"{path.name} is missing: {REMEDY}"
        if path.suffix != ".bin" and path.name not in NEARLY:
            assert path.read_bytes() == content, f"{path.name} is out of date: {REMEDY}"
    present = {file for file in VECTORS.rglob("*") if file.is_file()}
    assert present == {path for path in current_files if VECTORS in path.parents}


def test_the_golden_vectors_are_current(current_files: dict[Path, bytes]) -> None:
    """Equal except for the last bits of exp and log, which differ between processors, and dependent hashes."""
    for path, content in current_files.items():
        if path.suffix == ".bin":
            dtype = np.uint32 if path.name.endswith(".ids.bin") else np.float32
            actual, expected = (np.frombuffer(data, dtype) for data in (path.read_bytes(), content))
            assert np.allclose(actual, expected, rtol=1e-6), f"{path.name} is out of date: {REMEDY}"
        elif path.name in NEARLY:
            actual_json, expected_json = json.loads(path.read_bytes()), json.loads(content)
            assert nearly_equal(actual_json, expected_json), f"{path.name} is out of date: {REMEDY}"


def test_the_bundle_of_the_vectors_is_sound() -> None:
    bundle = Bundle.open(VECTORS / "bundle")
    assert bundle.problems() == []
    assert bundle.artifact_sha256("xnnpack") == read_golden(bundle).data["artifacts"]["xnnpack"]["sha256"]
    golden_vectors = json.loads((VECTORS / "golden.json").read_text())
    assert golden_vectors["golden_sha256"] == read_golden(bundle).sha256


def test_the_classifier_of_the_vectors_is_sound() -> None:
    bundle = Bundle.open(VECTORS / "classifier")
    assert bundle.problems() == []
    assert read_golden(bundle).top_k < bundle.config.output_size == 6
    found = json.loads((VECTORS / "classify.json").read_text())["golden"]
    assert found["golden_sha256"] == read_golden(bundle).sha256


def nearly_equal(actual: Any, expected: Any) -> bool:
    """True if JSON data is equal, except for hashes and the last digits of numbers."""
    if isinstance(actual, dict):
        return actual.keys() == expected.keys() and all(
            key.endswith("sha256") or nearly_equal(value, expected[key]) for key, value in actual.items()
        )
    if isinstance(actual, list):
        return len(actual) == len(expected) and all(map(nearly_equal, actual, expected))
    if isinstance(actual, float):
        return bool(actual == pytest.approx(expected, rel=1e-5, abs=1e-7))
    return bool(actual == expected)
