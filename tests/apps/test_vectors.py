"""tests/vectors is what the Python side computes today: the files that the Kotlin and Swift cores are held to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellama.bundle import Bundle
from edgellama.bundle.golden import read_golden
from tests.make_vectors import VECTORS, files

REMEDY = "run `python -m tests.make_vectors` and look at what changed"


@pytest.fixture(scope="module")
def made() -> dict[Path, bytes]:
    return files()


def test_the_vectors_are_current(made: dict[Path, bytes]) -> None:
    for path, content in made.items():
        assert path.is_file(), f"{path.name} is missing: {REMEDY}"
        if path.suffix != ".bin" and path.name not in ("golden.json", "manifest.json"):
            assert path.read_bytes() == content, f"{path.name} is out of date: {REMEDY}"
    present = {file for file in VECTORS.rglob("*") if file.is_file()}
    assert present == {path for path in made if VECTORS in path.parents}


def test_the_golden_vectors_are_current(made: dict[Path, bytes]) -> None:
    """Up to the last bits of exp and log, which differ between processors, and the hashes that follow from them."""
    for path, content in made.items():
        if path.suffix == ".bin":
            dtype = np.uint32 if path.name.endswith(".ids.bin") else np.float32
            found, expected = (np.frombuffer(data, dtype) for data in (path.read_bytes(), content))
            assert np.allclose(found, expected, rtol=1e-6), f"{path.name} is out of date: {REMEDY}"
        elif path.name in ("golden.json", "manifest.json"):
            one, other = json.loads(path.read_bytes()), json.loads(content)
            assert same(one, other), f"{path.name} is out of date: {REMEDY}"


def test_the_bundle_of_the_vectors_is_one() -> None:
    bundle = Bundle.open(VECTORS / "bundle")
    assert bundle.problems() == []
    assert bundle.artifact_sha256("xnnpack") == read_golden(bundle).data["artifacts"]["xnnpack"]["sha256"]
    whole = json.loads((VECTORS / "golden.json").read_text())
    assert whole["golden_sha256"] == read_golden(bundle).sha256


def same(one: Any, other: Any) -> bool:
    """Equal data, hashes left out and numbers but for their last digits."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            key.endswith("sha256") or same(value, other[key]) for key, value in one.items()
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == pytest.approx(other, rel=1e-5, abs=1e-7) if isinstance(one, float) else one == other)
